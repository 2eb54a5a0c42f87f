{{- define "overlay-csi.fullname" -}}
{{- default .Release.Name .Values.fullnameOverride | trunc 52 | trimSuffix "-" -}}
{{- end -}}

{{- define "overlay-csi.selectorLabels" -}}
app.kubernetes.io/name: overlay-csi
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end -}}

{{- define "overlay-csi.labels" -}}
{{ include "overlay-csi.selectorLabels" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ .Chart.Name }}-{{ .Chart.Version }}
{{- end -}}

{{- define "overlay-csi.serviceAccount" -}}
{{- if .Values.serviceAccount.create -}}
{{- default (include "overlay-csi.fullname" .) .Values.serviceAccount.name -}}
{{- else -}}
{{- required "serviceAccount.name is required where serviceAccount.create is false" .Values.serviceAccount.name -}}
{{- end -}}
{{- end -}}

{{- /* Name of a cluster-wide object: two releases of one name may be in different namespaces. */ -}}
{{- define "overlay-csi.clusterName" -}}
{{- $name := include "overlay-csi.fullname" . -}}
{{- if eq .Release.Namespace $name -}}
{{- $name -}}
{{- else -}}
{{- printf "%s-%s" .Release.Namespace $name -}}
{{- end -}}
{{- end -}}

{{- define "overlay-csi.pluginDir" -}}
{{ .Values.kubeletDir }}/plugins/{{ .Values.driverName }}
{{- end -}}

{{- /* Directory of a registry in certs.d: containerd's docs/hosts.md has _ for the colons of a port. */ -}}
{{- define "overlay-csi.registryDir" -}}
{{- if contains ":" . -}}
{{- printf "%s_" (replace ":" "_" .) -}}
{{- else -}}
{{- . -}}
{{- end -}}
{{- end -}}

{{- /* The registries and credentials of who resolves tags: flags, volume mounts and volumes. Each may be empty. */ -}}
{{- define "overlay-csi.registryArgs" }}
{{- if or .Values.registries .Values.hostRegistries }}
- --certs-dir=/etc/overlay-csi/certs.d
{{- end }}
{{- if .Values.nodeCredentials }}
- --registry-config=/etc/overlay-csi/registry/config.json
- --registry-config-namespaces={{ join "," .Values.nodeCredentialsNamespaces }}
{{- end }}
{{- end -}}

{{- define "overlay-csi.registryMounts" }}
{{- if or .Values.registries .Values.hostRegistries }}
- name: registries
  mountPath: /etc/overlay-csi/certs.d
  readOnly: true
{{- end }}
{{- if .Values.nodeCredentials }}
- name: node-credentials
  mountPath: /etc/overlay-csi/registry
  readOnly: true
{{- end }}
{{- end -}}

{{- define "overlay-csi.registryVolumes" }}
{{- if .Values.registries }}
- name: registries
  configMap:
    name: {{ include "overlay-csi.fullname" . }}-registries
    items:
      {{- range $host, $registry := .Values.registries }}
      {{- $dir := include "overlay-csi.registryDir" $host }}
      - key: {{ printf "%s.hosts.toml" ($host | sha256sum | trunc 16) }}
        path: {{ $dir }}/hosts.toml
      {{- range $name, $content := $registry.files }}
      - key: {{ printf "%s.%s" ($host | sha256sum | trunc 16) $name }}
        path: {{ $dir }}/{{ $name }}
      {{- end }}
      {{- end }}
{{- else if .Values.hostRegistries }}
- name: registries
  hostPath:
    path: {{ .Values.hostRegistries }}
    type: DirectoryOrCreate
{{- end }}
{{- with .Values.nodeCredentials }}
- name: node-credentials
  secret:
    secretName: {{ . }}
    items:
      - {key: .dockerconfigjson, path: config.json}
{{- end }}
{{- end -}}

{{- /* Not empty where a controller of the cluster provisions, and not each node. */ -}}
{{- define "overlay-csi.central" -}}
{{- if and (eq .Values.provisioner.mode "central") (or .Values.provisioner.enabled .Values.resizer.enabled .Values.snapshotter.enabled) -}}
true
{{- end -}}
{{- end -}}

{{- define "overlay-csi.controllerName" -}}
{{ include "overlay-csi.fullname" . }}-controller
{{- end -}}

{{- /* Not those of the DaemonSet, whose selector has no label that tells the two apart. */ -}}
{{- define "overlay-csi.controllerSelectorLabels" -}}
app.kubernetes.io/name: overlay-csi-controller
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end -}}

{{- define "overlay-csi.controllerLabels" -}}
{{ include "overlay-csi.controllerSelectorLabels" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ .Chart.Name }}-{{ .Chart.Version }}
{{- end -}}

{{- define "overlay-csi.controllerServiceAccount" -}}
{{- if .Values.controller.serviceAccount.create -}}
{{- default (include "overlay-csi.controllerName" .) .Values.controller.serviceAccount.name -}}
{{- else -}}
{{- required "controller.serviceAccount.name is required where controller.serviceAccount.create is false" .Values.controller.serviceAccount.name -}}
{{- end -}}
{{- end -}}

{{- /* Who provisions: the only ServiceAccount that makes PersistentVolumes. */ -}}
{{- define "overlay-csi.provisionerServiceAccount" -}}
{{- if include "overlay-csi.central" . -}}
{{- include "overlay-csi.controllerServiceAccount" . -}}
{{- else -}}
{{- include "overlay-csi.serviceAccount" . -}}
{{- end -}}
{{- end -}}

{{- define "overlay-csi.unprivileged" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities: {drop: [ALL]}
seccompProfile: {type: RuntimeDefault}
{{- end -}}

{{- /* What the containers of Kubernetes' sidecars end with, on a node. */ -}}
{{- define "overlay-csi.sidecarTail" -}}
securityContext:
  # root is the owner of the socket, and that is all that it is root for.
  runAsUser: 0
  {{- include "overlay-csi.unprivileged" . | nindent 2 }}
volumeMounts:
  - name: socket
    mountPath: /csi
{{- end -}}

{{- /* Rules of the sidecars, wherever they run. */ -}}
{{- define "overlay-csi.provisionerRules" -}}
- apiGroups: [""]
  resources: [persistentvolumeclaims]
  verbs: [list, watch, update]
- apiGroups: [""]
  resources: [persistentvolumes]
  verbs: [get, list, watch, create, patch, delete]
- apiGroups: [storage.k8s.io]
  resources: [storageclasses]
  verbs: [get, list, watch]
- apiGroups: [""]
  resources: [events]
  verbs: [create, patch]
{{- end -}}

{{- define "overlay-csi.resizerRules" -}}
- apiGroups: [""]
  resources: [persistentvolumeclaims]
  verbs: [get, list, watch]
- apiGroups: [""]
  resources: [persistentvolumeclaims/status]
  verbs: [patch]
- apiGroups: [""]
  resources: [persistentvolumes]
  verbs: [get, list, watch, patch]
- apiGroups: [""]
  resources: [events]
  verbs: [create, patch]
{{- end -}}

{{- /* Group snapshots the driver does not have. */ -}}
{{- define "overlay-csi.snapshotterArgs" -}}
- --csi-address=/csi/csi.sock
- --timeout=60s
- --feature-gates=CSIVolumeGroupSnapshot=false
{{- end -}}

{{- define "overlay-csi.snapshotterRules" -}}
- apiGroups: [snapshot.storage.k8s.io]
  resources: [volumesnapshotclasses]
  verbs: [list, watch]
- apiGroups: [snapshot.storage.k8s.io]
  resources: [volumesnapshotcontents]
  verbs: [get, list, watch, patch]
- apiGroups: [snapshot.storage.k8s.io]
  resources: [volumesnapshotcontents/status]
  verbs: [update, patch]
- apiGroups: [""]
  resources: [events]
  verbs: [create, patch]
{{- end -}}

{{- /* Egress to the API server, registries and DNS. */ -}}
{{- define "overlay-csi.egress" -}}
- ports:
    {{- range .Values.networkPolicy.apiServerPorts }}
    - port: {{ . }}
      protocol: TCP
    {{- end }}
    {{- range .Values.networkPolicy.registryPorts }}
    {{- if not (has . $.Values.networkPolicy.apiServerPorts) }}
    - port: {{ . }}
      protocol: TCP
    {{- end }}
    {{- end }}
    # DNS
    - port: 53
      protocol: UDP
    - port: 53
      protocol: TCP
{{- with .Values.networkPolicy.extraEgress }}
{{- toYaml . | nindent 0 }}
{{- end }}
{{- end -}}
