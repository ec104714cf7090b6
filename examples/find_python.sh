# Sourced by the scripts here, in the repository's root: sets $python to $BLISS_PYTHON, else to the environment that
# `make setup` made, else to the python3 of the environment that is active.
python=${BLISS_PYTHON:-}
if [ -z "$python" ]; then
  python=.venv/bin/python
  [ -x "$python" ] || python=$(command -v python3 || true)
fi
if ! "${python:-false}" -c 'import importlib.util as u; raise SystemExit(u.find_spec("megatron_bliss") is None)' > /dev/null; then
  echo "found no Python with megatron_bliss (tried ${python:-python3}): run make setup, or name one in BLISS_PYTHON" >&2
  exit 2
fi
