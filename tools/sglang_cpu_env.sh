#!/usr/bin/env bash
# A real SGLang server for a CPU: `bash tools/sglang_cpu_env.sh` makes .venv-sglang from pinned versions, once.
#
# The server runs in an environment of its own and speaks HTTP with the trainer. SGLang's published packages are for CUDA;
# on x86 without AMX it takes pure-torch paths, and tools/sglang_cpu_launcher.py stands in for the little that is left.
# Its own requirements would bring about 90 CUDA packages, so it is installed without them. About 2.5 GB, 2 to 3 minutes.
#
#   SGLANG_VENV   where (default .venv-sglang)      PYTHON   which interpreter (default python3.11, else python3.12)
set -euo pipefail
cd "$(dirname "$0")/.."
source tools/environment.sh
SGLANG_VENV=${SGLANG_VENV:-.venv-sglang}
bare=(sglang==0.5.21 triton==3.9.0 torchvision==0.28.0 compressed-tensors==0.18.0 gguf==0.19.0 xgrammar==0.2.7)
full=(
  torch==2.13.0 transformers==5.12.1 tokenizers==0.22.2 huggingface_hub==1.33.0 safetensors==0.8.0 numpy==2.4.6
  fastapi==0.165.0 starlette==1.10.0 uvicorn==0.54.0 uvloop==0.23.0 pyzmq==27.3.0 aiohttp==3.14.5 requests==2.34.2
  orjson==3.13.0 msgspec==0.22.0 pybase64==1.5.1 pydantic==2.14.3 python-multipart==0.0.34 psutil==7.2.2 setproctitle==1.3.8
  einops==0.8.2 pillow==13.0.0 prometheus_client==0.26.0 partial-json-parser==0.2.1.1.post7 interegular==0.3.3
  sentencepiece==0.2.3 tiktoken==0.14.0 xxhash==4.1.0 zstandard==0.25.0 cloudpickle==3.1.2 ipython==9.18.1 dill==0.4.1
  apache-tvm-ffi==0.1.11 loguru==0.7.3 openai==2.8.0 jsonschema==4.26.0 soundfile==0.14.0
)

wanted="${bare[*]} ${full[*]}"
stamp=$SGLANG_VENV/.complete
if [[ -f $stamp && $(cat "$stamp") == "$wanted" ]]; then
  echo "$SGLANG_VENV is complete"
  exit
fi
python=$(find_python)
[[ -x $SGLANG_VENV/bin/python ]] || "$python" -m venv "$SGLANG_VENV"
pip=("$SGLANG_VENV/bin/python" -m pip install --quiet --disable-pip-version-check)
echo "+ ${pip[*]} ${full[*]}"
"${pip[@]}" "${full[@]}"
echo "+ ${pip[*]} --no-deps ${bare[*]}"
"${pip[@]}" --no-deps "${bare[@]}"
echo "$wanted" > "$stamp"
echo "$SGLANG_VENV is complete"
