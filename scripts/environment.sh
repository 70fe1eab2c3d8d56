# Sourced by scripts/run and scripts/test: makes .venv from a hash-locked file, once per content.

# Prints a Python 3.11 to 3.13 that can make virtual environments, or says what is missing.
find_python() {
  local candidate
  for candidate in python3.13 python3.12 python3.11 python3 python; do
    if "$candidate" -c 'import sys, venv, ensurepip
sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' >/dev/null 2>&1; then
      echo "$candidate"
      return
    fi
  done
  echo "Shoal needs Python 3.11, 3.12 or 3.13 with its venv module, and found none." >&2
  echo "Install it (Debian, Ubuntu: apt-get install python3 python3-venv) and try again." >&2
  return 1
}

# install_locked FILE: installs FILE and Shoal itself into .venv unless that is done already.
install_locked() {
  local lock=$1 stamp=".venv/.installed-$1" wanted
  if [[ ! -x .venv/bin/python ]]; then
    local python
    python=$(find_python)
    echo "Making .venv with $("$python" --version) ..."
    "$python" -m venv .venv
  fi
  wanted=$(cat "$lock" pyproject.toml | sha256sum)
  if [[ -f $stamp && $(<"$stamp") == "$wanted" ]]; then
    build_kernels
    return
  fi
  echo "Installing $lock into .venv (some minutes and 6 GB the first time) ..."
  .venv/bin/python -m pip install --quiet --disable-pip-version-check --require-hashes -r "$lock"
  .venv/bin/python -m pip install --quiet --disable-pip-version-check --no-deps \
    --no-build-isolation --editable .
  echo "$wanted" >"$stamp"
  build_kernels
}

# Compiles what changed since the last time, after a `git pull` too; says why where it cannot, and
# torch serves instead.
build_kernels() {
  .venv/bin/python -m serve.kernels.build --quiet || true
}
