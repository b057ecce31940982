{{- define "zitadel-tokens.name" -}}
{{ .Values.nameOverride | default .Chart.Name | trunc 63 | trimSuffix "-" }}
{{- end }}

{{- define "zitadel-tokens.fullname" -}}
{{- $name := include "zitadel-tokens.name" . -}}
{{- if .Values.fullnameOverride -}}
{{ .Values.fullnameOverride | trunc 63 | trimSuffix "-" }}
{{- else if contains $name .Release.Name -}}
{{ .Release.Name | replace "." "-" | trunc 63 | trimSuffix "-" }}
{{- else -}}
{{ printf "%s-%s" .Release.Name $name | replace "." "-" | trunc 63 | trimSuffix "-" }}
{{- end -}}
{{- end }}

{{- define "zitadel-tokens.namespace" -}}
{{ .Values.namespaceOverride | default .Release.Namespace }}
{{- end }}

{{- /* Of cluster-scoped objects: releases of one name in several namespaces must not meet. */ -}}
{{- define "zitadel-tokens.clusterName" -}}
{{- $name := include "zitadel-tokens.fullname" . -}}
{{- $namespace := include "zitadel-tokens.namespace" . -}}
{{- if eq $name $namespace }}{{ $name }}{{ else }}{{ $name }}.{{ $namespace }}{{ end -}}
{{- end }}

{{- define "zitadel-tokens.serviceAccount" -}}
{{- if not (or .Values.serviceAccount.create .Values.serviceAccount.name) -}}
{{- fail "serviceAccount.create=false needs serviceAccount.name: the account may read Secrets" -}}
{{- end -}}
{{- .Values.serviceAccount.name | default (include "zitadel-tokens.fullname" .) -}}
{{- end }}

{{- /* A release of the chart knows the digest of its image; whoever names a tag wants that one. */ -}}
{{- define "zitadel-tokens.image" -}}
{{- $image := .Values.image -}}
{{- $released := index (.Chart.Annotations | default dict) "zitadel-tokens.dev/image-digest" -}}
{{- with (.Values.global).imageRegistry | default $image.registry }}{{ . }}/{{ end }}{{ $image.repository -}}
{{- with $image.digest | default (ternary $released "" (empty $image.tag)) }}@{{ . }}{{ else }}:{{ $image.tag | default $.Chart.AppVersion }}{{ end -}}
{{- end }}

{{- /* Of a chart that has this one as a part, and our own. Both kinds of list are common: names, and objects with one. */ -}}
{{- define "zitadel-tokens.imagePullSecrets" -}}
{{- $all := list -}}
{{- range concat ((.Values.global).imagePullSecrets | default list) (.Values.imagePullSecrets | default list) -}}
{{- $all = append $all (kindIs "string" . | ternary (dict "name" .) .) -}}
{{- end -}}
{{- with uniq $all }}{{ toYaml . }}{{ end -}}
{{- end }}

{{- /* Where and how a pod runs: the operator's, and that of `helm test`, which must be let onto the same nodes. */ -}}
{{- define "zitadel-tokens.podSettings" -}}
{{- with include "zitadel-tokens.imagePullSecrets" . }}
imagePullSecrets:
{{ . }}
{{- end }}
{{- range $field := list "priorityClassName" "runtimeClassName" "dnsPolicy" "dnsConfig" "hostAliases" "nodeSelector" "tolerations" "affinity" }}
{{- with index $.Values $field }}
{{ dict $field . | toYaml }}
{{- end }}
{{- end }}
{{- end }}

{{- define "zitadel-tokens.selector" -}}
app.kubernetes.io/name: {{ include "zitadel-tokens.name" . | quote }}
app.kubernetes.io/instance: {{ .Release.Name | quote }}
{{- end }}

{{- /* No key comes twice, which Flux and kustomize refuse, and none of ours is changed: pods are selected by them. */ -}}
{{- define "zitadel-tokens.labels" -}}
{{- $ours := include "zitadel-tokens.selector" . | fromYaml -}}
{{- $_ := set $ours "app.kubernetes.io/version" .Chart.AppVersion -}}
{{- $_ := set $ours "app.kubernetes.io/managed-by" .Release.Service -}}
{{- $_ := set $ours "helm.sh/chart" (printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_") -}}
{{- merge $ours (.Values.commonLabels | default dict) | toYaml }}
{{- end }}

{{- /* Several releases that serve the same instances would overwrite each other's word. */ -}}
{{- define "zitadel-tokens.writesInstanceStatus" -}}
{{- $choice := ternary "auto" (toString .Values.writeInstanceStatus) (kindIs "invalid" .Values.writeInstanceStatus) -}}
{{- if eq $choice "auto" }}{{ or (empty .Values.watchNamespaces) (not (empty .Values.instanceSelector)) }}{{ else }}{{ $choice }}{{ end -}}
{{- end }}

{{- /* Labels and annotations that users may set on token Secrets, as variables of both admission policies. One source with
the operator: `make crds` writes the file. */ -}}
{{- define "zitadel-tokens.allowedMetadata" -}}
{{- $keys := list -}}
{{- $prefixes := list -}}
{{- range concat (.Files.Lines "files/allowed-secret-metadata.txt") (.Values.allowedSecretMetadata | default list) -}}
{{- if hasSuffix "/*" . -}}
{{- $prefixes = append $prefixes (trimSuffix "/*" .) -}}
{{- else -}}
{{- $keys = append $keys . -}}
{{- end -}}
{{- end -}}
- name: keys
  expression: '{{ toJson $keys }}'
- name: prefixes
  expression: '{{ toJson $prefixes }}'
{{- end }}

{{- /* Whether `key` is in that list. */ -}}
{{- define "zitadel-tokens.allowedKey" -}}
(key in variables.keys || key.contains('/') && key.split('/')[0] in variables.prefixes)
{{- end }}
