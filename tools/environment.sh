# shellcheck shell=bash
# Sourced by the scripts beside it: makes .venv and keeps it up to date with pyproject.toml and constraints.txt.
#
#   make_environment project   .venv with this project, editable
#   make_environment test      the same, with the dependencies of its extra `test`; so for `mutants`
#   add_files_of PACKAGE...    packages of which only the files are read: installed without their dependencies
#
# They do nothing where nothing changed since they last succeeded. What fails ends in one line that says what it was and
# how to mend it. They set $root, the repository, and $python, the interpreter in .venv.

root=$(cd -P -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd -P)
venv=$root/.venv
python=$venv/bin/python
log=$root/.cache/setup.log

unset PYTHONPATH PYTHONHOME
export PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_INPUT=1 PIP_RETRIES="${PIP_RETRIES:-2}"

say() { printf '%s\n' "$*" >&2; }

fail() {
    say "error: $*"
    exit 1
}

# Runs $1, for pyenv leaves commands on the PATH that only print an error.
_is_new_cpython() {
    "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11) or sys.implementation.name != "cpython")' \
        </dev/null >/dev/null 2>&1
}

_find_python() {
    local candidate
    for candidate in python3.13 python3.12 python3.11 python3; do
        if _is_new_cpython "$candidate"; then
            command -v -- "$candidate"
            return
        fi
    done
    fail "there is no CPython 3.11 or newer on the PATH;" \
        "install one (apt install python3-venv, brew install python, or python.org) and run this again"
}

_prepare_log() {
    if ! { mkdir -p -- "$root/.cache" && : >>"$log"; } 2>/dev/null; then
        fail "$root cannot be written to; run this in a copy of the repository that you own"
    fi
}

# One run at a time, where the system has flock. pip inherits the lock, so it holds even when this shell is killed.
_lock() {
    exec 9<"$root"
    command -v flock >/dev/null || return 0
    flock --nonblock 9 && return
    say "waiting for another run that is setting up .venv"
    flock 9 || true
}

_unlock() { exec 9<&-; }

# The file `installing` stays behind where pip was stopped half-way: nothing in such an environment can be trusted.
_make_venv() {
    local base
    if [[ ! -e $venv/installing ]] && _is_new_cpython "$python" && "$python" -m pip --version </dev/null >/dev/null 2>&1; then
        return
    fi
    base=$(_find_python)
    if [[ -e $venv || -L $venv ]]; then
        say "making .venv anew: it is unfinished or broken"
        # Under another name first: what is left of it where this is stopped half-way must not look like a whole one.
        rm -rf -- "$venv-broken" && mv -- "$venv" "$venv-broken" && rm -rf -- "$venv-broken" ||
            fail "$venv is broken and cannot be removed; remove it by hand and run this again"
    fi
    if ! "$base" -m venv "$venv" </dev/null >"$log" 2>&1; then
        rm -rf -- "$venv"
        fail "$base could not make $venv; on Debian and Ubuntu, apt install python3-venv, then run this again; log: $log"
    fi
}

# What the installed packages depend on. It holds the place of .venv, for a moved one has stale paths in its scripts.
_key() {
    {
        printf '%s\n' "$venv"
        "$python" -c 'import sys; print(sys.version)'
        cat -- "$root/pyproject.toml" "$root/tools/constraints.txt"
    } | cksum
}

_installed() { [[ -f $venv/$1.installed && $(<"$venv/$1.installed") == "$(_key)" ]]; }

# pip's commonest complaints, as a cause and what mends it.
_why_pip_failed() {
    local missing
    missing=$(sed -n 's/.*No matching distribution found for \(.*\)/\1/p' "$log" | tail -n 1)
    if grep -qi 'No space left on device' "$log"; then
        echo "the disk is full; free 3 GB"
    elif grep -qiE 'ConnectionError|ConnectTimeout|ReadTimeout|NameResolution|Failed to establish|ProxyError|SSLError' "$log"; then
        echo "the package index cannot be reached; check the network, or PIP_INDEX_URL"
    elif [[ -n $missing ]]; then
        echo "the package index has no $missing for this Python and platform; try another Python, or another PIP_INDEX_URL"
    else
        echo "$(grep -i '^ *error' "$log" | tail -n 1); mend that"
    fi
}

# _install NAME WHAT ARGUMENT...: pip install with ARGUMENTs, unless the stamp of NAME says that it is done.
_install() {
    local name=$1 what=$2
    shift 2
    say "installing $what into .venv (the first time, this takes minutes)"
    rm -f -- "$venv/$name.installed"
    : >"$venv/installing"
    if (cd -- "$root" && "$python" -m pip install --constraint tools/constraints.txt "$@" </dev/null >"$log" 2>&1); then
        _key >"$venv/$name.installed"
        rm -f -- "$venv/installing"
        return
    fi
    grep -q '^Installing collected packages' "$log" || rm -f -- "$venv/installing"
    if grep -q '^ERROR: Operation cancelled' "$log"; then fail "setting up .venv was interrupted; run this again"; fi
    fail "pip could not install $what: $(_why_pip_failed), and run this again; log: $log"
}

make_environment() {
    _prepare_log
    _lock
    _make_venv
    if ! _installed "$1"; then
        if [[ $1 == project ]]; then
            _install project "fxcompile" --editable .
        else
            _install "$1" "fxcompile and its extra $1" --editable ".[$1]"
            cp -- "$venv/$1.installed" "$venv/project.installed"
        fi
    fi
    _unlock
}

add_files_of() {
    local package
    _lock
    for package in "$@"; do
        _installed "$package" || _install "$package" "$package" --no-deps "$package"
    done
    _unlock
}
