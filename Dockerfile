# The image of the driver: the programs of cmd/, mount(8), which views are mounted with on kernels before Linux 6.7, and what
# makes and grows the file systems of uppers with a size: mkfs.ext4, e2fsck, resize2fs, blkid, btrfs; igzip, which decompresses layers where
# Debian has it (amd64, arm64); with their libraries. Built for other architectures by cross-compiling, never by emulation:
#
#   docker buildx build --platform linux/amd64,linux/arm64 -t overlay-csi .
#
# The classic builder sets none of BUILDPLATFORM, TARGETOS and TARGETARCH: it builds for the machine that it runs on.
ARG GO_IMAGE=golang:1.26
ARG DEBIAN_IMAGE=debian:bookworm-slim
ARG BASE_IMAGE=gcr.io/distroless/static-debian12:latest

FROM --platform=${BUILDPLATFORM:-linux} ${GO_IMAGE} AS build
WORKDIR /src
COPY go.mod go.sum ./
RUN go mod download
COPY cmd cmd
COPY pkg pkg
ARG TARGETOS
ARG TARGETARCH
ENV CGO_ENABLED=0 GOOS=${TARGETOS} GOARCH=${TARGETARCH}
# Compiled apart from the link, which alone depends on the version: most new versions change no package.
# grpcnotrace leaves html/template out of the driver, with which the linker could drop no method: 10 MB of 43.
RUN go build -trimpath -buildvcs=false -tags grpcnotrace ./cmd/overlay-csi ./cmd/overlayctl ./pkg/...
ARG VERSION=unknown
RUN go build -trimpath -buildvcs=false -tags grpcnotrace -ldflags "-s -w -X main.version=${VERSION}" -o /out/ ./cmd/overlay-csi ./cmd/overlayctl

FROM --platform=${BUILDPLATFORM:-linux} ${DEBIAN_IMAGE} AS programs
ARG TARGETARCH
WORKDIR /packages
# status.d tells scanners of images what packages the files are from, as in all distroless images.
RUN arch=${TARGETARCH:-$(dpkg --print-architecture)} && \
    dpkg --add-architecture "$arch" && \
    apt-get update -qq && \
    mkdir -p /out/var/lib/dpkg/status.d && \
    for package in mount libmount1 libblkid1 libselinux1 libpcre2-8-0 libc6 util-linux e2fsprogs libext2fs2 libcom-err2 libuuid1 \
      btrfs-progs zlib1g liblzo2-2 libzstd1 libudev1 \
      $(case "$arch" in amd64 | arm64) echo isal libisal2 ;; esac); do \
      apt-get download -qq -o APT::Sandbox::User=root "$package:$arch" && \
      dpkg-deb --extract "$package"_*.deb all && \
      dpkg-deb --field "$package"_*.deb > "/out/var/lib/dpkg/status.d/$package" || exit 1; \
    done && \
    cd all && chmod 755 bin/mount && \
    cp -a --parents bin/mount sbin/blkid sbin/mke2fs sbin/mkfs.ext4 sbin/e2fsck sbin/resize2fs bin/btrfs \
      $(find . \( -path ./usr/bin/igzip -o -name 'libisal.so.*' -o -name 'ld-linux*.so.*' -o -name 'libc.so.*' -o -name 'libmount.so.*' -o -name 'libblkid.so.*' -o -name 'libselinux.so.*' \
      -o -name 'libpcre2-8.so.*' -o -name 'libext2fs.so.*' -o -name 'libe2p.so.*' -o -name 'libcom_err.so.*' -o -name 'libuuid.so.*' \
      -o -name 'libz.so.*' -o -name 'liblzo2.so.*' -o -name 'libzstd.so.*' -o -name 'libudev.so.*' \)) /out/

FROM ${BASE_IMAGE}
ARG VERSION=unknown
ARG REVISION=unknown
LABEL org.opencontainers.image.title="overlay-csi" \
      org.opencontainers.image.description="Kubernetes CSI driver for overlay volumes" \
      org.opencontainers.image.source="https://github.com/overlay-csi/overlay-csi" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}"
COPY --from=programs /out/ /
COPY --from=build /out/ /usr/local/bin/
# Mounting needs root; the chart says what else the container may do.
USER 0:0
ENTRYPOINT ["/usr/local/bin/overlay-csi"]
