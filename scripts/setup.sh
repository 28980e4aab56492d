# Sourced by the other scripts: an active Python environment with requirements.txt in it, made in .venv where none is.
# Conda's base, which many shells activate by themselves, counts as none: nobody wants pinned versions in it.
cd "$(dirname "${BASH_SOURCE[0]}")/.."

if [ -z "${VIRTUAL_ENV:-}" ] && [ "${CONDA_DEFAULT_ENV:-base}" = base ]; then
    if [ ! -f .venv/bin/activate ] || ! .venv/bin/python -m pip --version >/dev/null 2>&1; then # none, or a cut one
        for python in python3 python3.13 python3.12 python3.11; do
            "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && break
            python=
        done
        [ -n "$python" ] || { echo "Python 3.11 or newer is needed; install it (with its venv module) and try again" >&2; exit 2; }
        echo "making a virtual environment in .venv"
        "$python" -m venv --clear .venv || { rm -rf .venv; echo "$python has no venv module (Debian: apt install python3-venv)" >&2; exit 2; }
    fi
    source .venv/bin/activate
fi

# Installed once per version of the files: a stamp in the environment holds what was installed. test.sh adds a file.
requirements=(requirements.txt ${MORE_REQUIREMENTS:-})
stamp="$(python -c 'import sys; print(sys.prefix)')/.gmt-${requirements[-1]}"
if ! cat "${requirements[@]}" | cmp -s - "$stamp"; then
    echo "installing ${requirements[*]} into $(dirname "$stamp")"
    python -m pip install -q "${requirements[@]/#/-r}" || { echo "pip install ${requirements[*]/#/-r } failed: see above" >&2; exit 1; }
    cat "${requirements[@]}" >"$stamp"
fi
