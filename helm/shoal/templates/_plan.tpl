{{/*
What the release serves: presets, what fits, and overrides, merged by look-ups alone.
The twin of cluster/helm_values/resolved.py.

  models: effective models, with their path and replicas
  hardware: effective hardware of the pods
  size: shards of a copy
  longest: the longest generation in seconds
  diskGib: size of a volume for all weights
  source: where the weights are
  upgrade: None | NewCluster | Incremental
*/}}
{{- define "shoal.plan" -}}
{{- $fits := .Files.Get "files/configs/fits.yaml" | fromYaml -}}
{{- $source := include "shoal.weightsSource" . -}}
{{- $models := list -}}
{{- $hardware := dict -}}
{{- $size := "" -}}
{{- $longest := 0.0 -}}
{{- $disk := 0 -}}
{{- range $index, $entry := include "shoal.servedModels" . | fromYamlArray -}}
  {{- $key := ternary (printf "models[%d]." $index) "" (not (empty $.Values.models)) -}}
  {{- $fit := include "shoal.fit" (dict "fits" $fits "entry" $entry "hardware" $.Values.hardware.preset "key" $key) | fromYaml -}}
  {{- if and $size (ne $fit.size $size) -}}
    {{- fail (printf "%stensorParallel: must be %s, the size of the first model, got %s" $key $size $fit.size) -}}
  {{- end -}}
  {{- $size = $fit.size -}}
  {{- $model := $.Files.Get (printf "files/configs/models/%s.yaml" $entry.preset) | fromYaml -}}
  {{- $model = mustMergeOverwrite $model $fit.model (default dict $entry.overrides) -}}
  {{- $folder := ternary (printf "/opt/shoal/models/%s" $entry.preset) (printf "/models/%s" $model.name) (eq $source "baked") -}}
  {{- $model = merge (dict "preset" $entry.preset "path" $folder "replicas" $entry.replicas) $model -}}
  {{- $models = append $models $model -}}
  {{- $longest = maxf $longest (include "shoal.longest" $model | float64) -}}
  {{- $disk = add $disk (int64 $fit.diskGib) -}}
  {{- if not $hardware -}}
    {{- $preset := $.Files.Get (printf "files/configs/hardware/%s.yaml" $.Values.hardware.preset) | fromYaml -}}
    {{- $hardware = mustMergeOverwrite $preset $fit.hardware (deepCopy (default dict $.Values.hardware.overrides)) -}}
  {{- else -}}
    {{- include "shoal.checkMemory" (dict "needed" $fit.hardware.pod.memory "given" $hardware.pod.memory "key" $key) -}}
  {{- end -}}
{{- end -}}
{{- $upgrade := default (default "None" $hardware.upgrade) .Values.upgrade.type -}}
{{- dict "models" $models "hardware" $hardware "size" $size "longest" $longest "diskGib" $disk "source" $source "upgrade" $upgrade | toYaml -}}
{{- end }}

{{/* The models of the values: the list, or the one that the short form describes. */}}
{{- define "shoal.servedModels" -}}
{{- $short := dict "preset" .Values.model.preset "overrides" .Values.model.overrides "tensorParallel" .Values.tensorParallel "replicas" .Values.replicas -}}
{{- range $entry := default (list $short) .Values.models }}
{{- $replicas := merge (dict) (default dict $entry.replicas) (dict "min" 1 "max" 1 "targetOngoing" 16) }}
- {{ merge (dict "replicas" $replicas) $entry | toYaml | nindent 2 | trim }}
{{- end }}
{{- end }}

{{- define "shoal.weightsSource" -}}
{{- $others := dict -}}
{{- range $entry := include "shoal.servedModels" . | fromYamlArray -}}
  {{- if ne $entry.preset "demo" }}{{ $_ := set $others $entry.preset true }}{{ end -}}
{{- end -}}
{{- default (ternary "pvc" "baked" (not (empty $others))) (get .Values.weights "from") -}}
{{- end }}

{{/* The entry of files/configs/fits.yaml for one model; refuses what does not fit, and says why. */}}
{{- define "shoal.fit" -}}
{{- $found := dig .entry.preset .hardware dict .fits -}}
{{- $where := printf "%s on %s" .entry.preset .hardware -}}
{{- if not $found.sizes -}}
  {{- fail (printf "%spreset: %s: %s" (default "model." .key) $where (default "nothing is known about it" $found.refused)) -}}
{{- end -}}
{{- $size := $found.chosen -}}
{{- with .entry.tensorParallel }}{{ $size = toString (int64 .) }}{{ end -}}
{{- if not (hasKey $found.sizes $size) -}}
  {{- $reason := default "it does not divide the model's heads" (get (default dict $found.unfit) $size) -}}
  {{- fail (printf "%stensorParallel: %s cannot be used for %s: %s; sizes that fit: %s" .key $size $where $reason (keys $found.sizes | sortAlpha | join ", ")) -}}
{{- end -}}
{{- merge (dict "size" $size "diskGib" $found.disk_gib) (get $found.sizes $size) | toYaml -}}
{{- end }}

{{/* The first model sizes the pods: another one must not need more. */}}
{{- define "shoal.checkMemory" -}}
{{- if and (hasSuffix "Gi" .given) (gt (trimSuffix "Gi" .needed | int) (trimSuffix "Gi" .given | int)) -}}
  {{- fail (printf "%spreset: needs pods of %s, those of the first model have %s: put it first, or set hardware.overrides.pod.memory" .key .needed .given) -}}
{{- end -}}
{{- end }}

{{- define "shoal.longest" -}}
{{- default 600 .longest_generation_s -}}
{{- end }}

{{/* Seconds in which a pod may finish its streams, HAProxy's own limit included. */}}
{{- define "shoal.graceSeconds" -}}
{{- add 90 (int64 .longest) -}}
{{- end }}
