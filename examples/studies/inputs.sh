# Sourced by the studies' prepare.sh with its arguments, a glob and files: leaves them as absolute paths in "pages" and "files",
# goes to the repository's root, and finds its Python.
pages=$1
case $pages in /*) ;; *) pages=$PWD/$pages ;; esac
shift
files=()
for file in "$@"; do files+=("$(realpath "$file")"); done
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
. examples/find_python.sh
