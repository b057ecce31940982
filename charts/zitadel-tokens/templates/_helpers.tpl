{{- define "zitadel-tokens.name" -}}
{{ .Values.nameOverride | default .Chart.Name | trunc 63 | trimSuffix "-" }}
{{- end }}

{{- define "zitadel-tokens.fullname" -}}
{{- $name := include "zitadel-tokens.name" . -}}
{{- if .Values.fullnameOverride -}}
{{ .Values.fullnameOverride | trunc 63 | trimSuffix "-" }}
{{- else if contains $name .Release.Name -}}
{{ .Release.Name | trunc 63 | trimSuffix "-" }}
{{- else -}}
{{ printf "%s-%s" .Release.Name $name | trunc 63 | trimSuffix "-" }}
{{- end -}}
{{- end }}

{{- /* Of cluster-scoped objects: releases of one name in several namespaces must not meet. */ -}}
{{- define "zitadel-tokens.clusterName" -}}
{{- $name := include "zitadel-tokens.fullname" . -}}
{{- if eq $name .Release.Namespace }}{{ $name }}{{ else }}{{ $name }}.{{ .Release.Namespace }}{{ end -}}
{{- end }}

{{- define "zitadel-tokens.serviceAccount" -}}
{{- $made := include "zitadel-tokens.fullname" . -}}
{{- .Values.serviceAccount.name | default (ternary $made "default" .Values.serviceAccount.create) -}}
{{- end }}

{{- define "zitadel-tokens.image" -}}
{{- $image := .Values.image -}}
{{- with $image.registry }}{{ . }}/{{ end }}{{ $image.repository -}}
{{- if $image.digest }}@{{ $image.digest }}{{ else }}:{{ $image.tag | default .Chart.AppVersion }}{{ end -}}
{{- end }}

{{- define "zitadel-tokens.selector" -}}
app.kubernetes.io/name: {{ include "zitadel-tokens.name" . }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{- define "zitadel-tokens.labels" -}}
{{ include "zitadel-tokens.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" }}
{{- with .Values.commonLabels }}
{{ toYaml . }}
{{- end }}
{{- end }}

{{- /* Several releases that serve the same instances would overwrite each other's word. */ -}}
{{- define "zitadel-tokens.writesInstanceStatus" -}}
{{- $choice := toString .Values.writeInstanceStatus -}}
{{- if eq $choice "auto" }}{{ or (empty .Values.watchNamespaces) (not (empty .Values.instanceSelector)) }}{{ else }}{{ $choice }}{{ end -}}
{{- end }}
