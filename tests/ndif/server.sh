#!/usr/bin/env bash
# A real NDIF server on this machine's loopback, on the CPU, for the tests in this folder.
#   server.sh install         make the server's own virtual environment, once
#   server.sh up REPO=DIR...   start Redis, an S3 store, a Hub that serves each DIR as REPO, Ray and NDIF
#   server.sh api             start the API again after it was killed
#   server.sh down            stop everything that `up` and `api` started
# State lies in $NDIF_RUN (default: ~/.cache/mamba-ioi-ndif). The API is at http://127.0.0.1:8001.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
root=$(cd "$here/../.." && pwd)
run=${NDIF_RUN:-$HOME/.cache/mamba-ioi-ndif}
venv=$run/venv
mkdir -p "$run/logs" "$run/ray"

environment() {
  export PATH=$venv/bin:$PATH NDIF_HOME=$run/home HF_HOME=$run/hf HF_ENDPOINT=http://127.0.0.1:9700
  export NDIF_REDIS_URL=redis://127.0.0.1:6399
  export NDIF_OBJECT_STORE_URL=http://127.0.0.1:9900 NDIF_OBJECT_STORE_ACCESS_KEY=test NDIF_OBJECT_STORE_SECRET_KEY=test
  export NDIF_RAY_ADDRESS=ray://127.0.0.1:10001 NDIF_RAY_HEAD_PORT=6385
  export NDIF_API_URL=http://127.0.0.1:8001 NDIF_API_PORT=8001
  export NDIF_DEFAULT_DTYPE=${NDIF_DTYPE:-float32} NDIF_DEFAULT_PADDING_BIAS=0
  export NDIF_DEFAULT_EXECUTION_TIMEOUT_SECONDS=600  # a timeout may leave a sandboxed model dead
  export NDIF_MODEL_IMPORT_PATH=cpu_actor.CPUSandboxModelActor NDIF_SANDBOX_POOL_SIZE=2
  export PYTHONPATH=$here GRPC_ENABLE_FORK_SUPPORT=0 RAY_USAGE_STATS_ENABLED=0 HF_HUB_DISABLE_TELEMETRY=1
  export OMP_NUM_THREADS=1
  # a busy machine is slow to start Ray
  export RAY_DASHBOARD_STARTUP_TIMEOUT_S=600 RAY_raylet_start_wait_time_s=600 RAY_worker_register_timeout_seconds=600
  export RAY_agent_register_timeout_ms=600000 RAY_gcs_server_port_wait_time_s=600 RAY_CLIENT_SERVER_CHECK_CHANNEL_TIMEOUT_S=600
  export RAY_worker_niceness=0
}

install() {
  if ! command -v redis-server >/dev/null; then
    apt-get update -qq && apt-get install -y -qq --no-install-recommends redis-server >/dev/null
  fi
  python3 -m venv "$venv"
  "$venv/bin/pip" install -q -c <(grep -v '^nnsight' "$root/constraints.txt") torch transformers nnsight==0.8.0 \
    pydantic redis click python-dotenv pyyaml boto3 fastapi "uvicorn[standard]" gunicorn python-multipart \
    "ray[default]" accelerate numpy zstandard peft "moto[server]"
  "$venv/bin/pip" install -q --no-deps --ignore-requires-python ndif==0.1.2
}

start() { # NAME COMMAND...: in the background, in a session of its own, with its process id in $run/NAME.pid
  local name=$1
  shift
  setsid nohup "$@" >"$run/logs/$name.log" 2>&1 &
  echo $! >"$run/$name.pid"
}

api() {
  environment
  redis-cli -p 6399 del ray:connected >/dev/null  # which an API that was killed has left behind
  NDIF_SERVICE=api start api gunicorn --config python:ndif.services.api.gunicorn_conf --bind 127.0.0.1:8001 keyed_api:app
  for _ in $(seq 240); do
    if curl -s http://127.0.0.1:8001/connected | grep -q '"connected"'; then
      echo "NDIF is up at http://127.0.0.1:8001"
      return
    fi
    sleep 1
  done
  echo "NDIF did not come up; see $run/logs" >&2
  exit 1
}

# Ray's raylet gives its dashboard agent 15 s to write down the port that it was told, and a busy machine takes longer.
write_agent_port() {
  local session=$run/ray/session_latest id
  for _ in $(seq 1200); do
    id=$(grep -ohE 'node_id=[0-9a-f]+' "$session/logs/raylet.out" 2>/dev/null | head -1 || true)
    if [ -n "$id" ]; then
      printf 8367 >"$session/dashboard_agent_listen_port_${id#node_id=}"
      return
    fi
    sleep 0.5
  done
}

up() {
  environment
  write_agent_port &
  start redis redis-server --bind 127.0.0.1 --port 6399 --save '' --dir "$run"
  start moto moto_server -H 127.0.0.1 -p 9900
  start hub python "$here/hub.py" 9700 "$@"
  # a CPU, as Ray counts them, for the controller and for each model: one more model would wait for ever
  ray start --head --node-ip-address=127.0.0.1 --port=6385 --ray-client-server-port=10001 --num-cpus=$(($# + 1)) --num-gpus=1 \
    --resources='{"head":10,"cuda_memory_bytes":8000000000,"cpu_memory_bytes":8000000000}' \
    --include-dashboard=true --dashboard-host=127.0.0.1 --dashboard-port=8265 --temp-dir="$run/ray" \
    --dashboard-agent-grpc-port=8366 --dashboard-agent-listen-port=8367 --metrics-export-port=8368 \
    --runtime-env-agent-port=8369 --object-store-memory=200000000 --disable-usage-stats >"$run/logs/ray.log" 2>&1
  RAY_ADDRESS=127.0.0.1:6385 NDIF_SERVICE=ray python -m ndif.services.ray.deployments.controller.controller \
    >"$run/logs/controller.log" 2>&1
  api
}

down() {
  # What was started here by its process id, and every process of the server's virtual environment or of this run.
  for file in "$run"/*.pid; do
    if [ -f "$file" ]; then kill -9 "$(cat "$file")" 2>/dev/null || true; fi
  done
  for process in /proc/[0-9]*; do
    pid=${process#/proc/}
    [ "$pid" = $$ ] && continue
    case "$(tr '\0' ' ' 2>/dev/null <"$process/cmdline" || true)" in
      *server.sh*) ;;
      "$venv"/*) kill -9 "$pid" 2>/dev/null || true ;;
      *)
        if { tr '\0' '\n' <"$process/environ" | grep -qx "NDIF_HOME=$run/home"; } 2>/dev/null; then
          kill -9 "$pid" 2>/dev/null || true
        fi
        ;;
    esac
  done
  rm -rf "$run"/ray/* "$run"/*.pid
}

case "${1:-}" in
  install | up | api | down)
    command=$1
    shift
    "$command" "$@"
    ;;
  *)
    sed -n '2,7p' "$0"
    exit 2
    ;;
esac
