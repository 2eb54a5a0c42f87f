// Command kubectl-overlay is a plugin of kubectl for people who have no shell on nodes: it shows and keeps what pods wrote to their
// volumes. It finds the node that has a volume, and runs overlayctl in the driver's pod there, with the rights of its user.
package main
