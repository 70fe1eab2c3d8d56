{{/* serveConfigV2, as cluster/manifests.py makes it. Takes (dict "root" $ "plan" $plan). */}}
{{- define "shoal.serveConfig" -}}
{{- $values := .root.Values -}}
{{- $plan := .plan -}}
http_options:
  host: 0.0.0.0
  port: 8000
applications:
{{- range $model := $plan.models }}
  - name: {{ include "shoal.application" $model }}
    route_prefix: null
    import_path: serve.app:build_model
    args:
      model:
        {{- include "shoal.modelArgs" $model | nindent 8 }}
      hardware:
        {{- pick $plan.hardware "name" "device" "threads_per_shard" "kernels" | toYaml | nindent 8 }}
      log_level: {{ $values.logLevel }}
    deployments:
      - name: Replica
        graceful_shutdown_timeout_s: {{ include "shoal.longest" $model }}
        graceful_shutdown_wait_loop_s: 0.5
        ray_actor_options:
          num_cpus: 1
        placement_group_bundles:
          {{- include "shoal.bundles" $plan | nindent 10 }}
        placement_group_strategy: STRICT_PACK
        max_surge_percent: {{ ternary 0 100 (eq $plan.hardware.has_spare false) }}
        {{- include "shoal.counts" $model.replicas | nindent 8 }}
        {{- with $model.prediction }}
        user_config:
          prediction:
            {{- toYaml . | nindent 12 }}
        {{- end }}
{{- end }}
  - name: shoal
    route_prefix: /
    import_path: serve.app:build_ingress
    args:
      http:
        host: 0.0.0.0
        port: 8000
        {{- if $values.auth.apiKeys.existingSecret }}
        keys_file: /etc/shoal/keys/{{ $values.auth.apiKeys.key }}
        {{- else }}
        allow_anonymous: true
        {{- end }}
        {{- if not $values.web.enabled }}
        page: false
        {{- end }}
        {{- with $values.maxBodyBytes }}
        max_body_bytes: {{ int64 . }}
        {{- end }}
      models:
        {{- range $model := $plan.models }}
        -
          {{- include "shoal.modelArgs" $model | nindent 10 }}
        {{- end }}
      log_level: {{ $values.logLevel }}
    deployments:
      - name: Ingress
        num_replicas: {{ $values.ingressCopies }}
        graceful_shutdown_timeout_s: {{ $plan.longest }}
        graceful_shutdown_wait_loop_s: 0.5
        ray_actor_options:
          num_cpus: 0.25
        max_surge_percent: 100
{{- end }}

{{- define "shoal.application" -}}
model-{{ regexReplaceAll "[^a-z0-9]+" (lower .name) "-" | trimAll "-" }}
{{- end }}

{{- define "shoal.modelArgs" -}}
{{- omit . "preset" "repository" "revision" "replicas" "prediction" | toYaml -}}
{{- end }}

{{/* One bundle per shard; the replica's own share is added to the first. */}}
{{- define "shoal.bundles" -}}
{{- $gpu := ternary ", GPU: 1" "" (eq .hardware.device "cuda") -}}
- {CPU: 2{{ $gpu }}}
{{- range until (sub (int .size) 1 | int) }}
- {CPU: 1{{ $gpu }}}
{{- end }}
{{- end }}

{{- define "shoal.counts" -}}
{{- if eq (int .min) (int .max) -}}
num_replicas: {{ .min }}
{{- else -}}
autoscaling_config:
  min_replicas: {{ .min }}
  max_replicas: {{ .max }}
  target_ongoing_requests: {{ .targetOngoing }}
  metrics_interval_s: 1
  look_back_period_s: 5
  upscale_delay_s: 3
  downscale_delay_s: 120
{{- end -}}
{{- end }}
