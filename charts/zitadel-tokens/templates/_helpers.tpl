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

{{- /* Name of cluster-scoped objects, unique among releases with the same name in different namespaces. */ -}}
{{- define "zitadel-tokens.clusterName" -}}
{{- $name := include "zitadel-tokens.fullname" . -}}
{{- $namespace := include "zitadel-tokens.namespace" . -}}
{{- if eq $name $namespace }}{{ $name }}{{ else }}{{ $name }}.{{ $namespace }}{{ end -}}
{{- end }}

{{- define "zitadel-tokens.serviceAccount" -}}
{{- if not (or .Values.serviceAccount.create .Values.serviceAccount.name) -}}
{{- fail "serviceAccount.create=false requires serviceAccount.name: otherwise the default service account of the namespace could read Secrets" -}}
{{- end -}}
{{- .Values.serviceAccount.name | default (include "zitadel-tokens.fullname" .) -}}
{{- end }}

{{- /* A released chart contains the digest of its image. An explicit tag overrides that digest. */ -}}
{{- define "zitadel-tokens.image" -}}
{{- $image := .Values.image -}}
{{- $released := index (.Chart.Annotations | default dict) "zitadel-tokens.dev/image-digest" -}}
{{- with (.Values.global).imageRegistry | default $image.registry }}{{ . }}/{{ end }}{{ $image.repository -}}
{{- with $image.digest | default (ternary $released "" (empty $image.tag)) }}@{{ . }}{{ else }}:{{ $image.tag | default $.Chart.AppVersion }}{{ end -}}
{{- end }}

{{- /* Image pull secrets of the parent chart and of this chart. Entries may be names or objects with a name. */ -}}
{{- define "zitadel-tokens.imagePullSecrets" -}}
{{- $all := list -}}
{{- range concat ((.Values.global).imagePullSecrets | default list) (.Values.imagePullSecrets | default list) -}}
{{- $all = append $all (kindIs "string" . | ternary (dict "name" .) .) -}}
{{- end -}}
{{- with uniq $all }}{{ toYaml . }}{{ end -}}
{{- end }}

{{- /* Scheduling and runtime settings of the operator's pods. The pod of `helm test` has the same, because it must be able to
run on the same nodes. */ -}}
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

{{- /* commonLabels must not override the chart's own labels, because selectors use them. Merging also avoids duplicate keys,
which Flux and kustomize reject. */ -}}
{{- define "zitadel-tokens.labels" -}}
{{- $ours := include "zitadel-tokens.selector" . | fromYaml -}}
{{- $_ := set $ours "app.kubernetes.io/version" .Chart.AppVersion -}}
{{- $_ := set $ours "app.kubernetes.io/managed-by" .Release.Service -}}
{{- $_ := set $ours "helm.sh/chart" (printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_") -}}
{{- merge $ours (.Values.commonLabels | default dict) | toYaml }}
{{- end }}

{{- /* Releases that serve the same instances would overwrite each other's status. */ -}}
{{- define "zitadel-tokens.writesInstanceStatus" -}}
{{- $choice := ternary "auto" (toString .Values.writeInstanceStatus) (kindIs "invalid" .Values.writeInstanceStatus) -}}
{{- if eq $choice "auto" }}{{ or (empty .Values.watchNamespaces) (not (empty .Values.instanceSelector)) }}{{ else }}{{ $choice }}{{ end -}}
{{- end }}

{{- /* Labels and annotations that users may set on token Secrets, as variables of both admission policies. `make generate`
writes the file from the operator's code. */ -}}
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

{{- /* CEL expression: whether `key` is allowed. */ -}}
{{- define "zitadel-tokens.allowedKey" -}}
(key in variables.keys || key.contains('/') && key.split('/')[0] in variables.prefixes)
{{- end }}
