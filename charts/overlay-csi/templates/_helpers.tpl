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

{{- /* What the containers of Kubernetes' sidecars end with. */ -}}
{{- define "overlay-csi.sidecarTail" -}}
securityContext:
  # root is the owner of the socket, and that is all that it is root for.
  runAsUser: 0
  allowPrivilegeEscalation: false
  readOnlyRootFilesystem: true
  capabilities: {drop: [ALL]}
  seccompProfile: {type: RuntimeDefault}
volumeMounts:
  - name: socket
    mountPath: /csi
{{- end -}}
