#!/bin/sh
# Installs what the tests need from the system, where that is possible: Debian's packages, as root
# or with sudo. Elsewhere the tests that need them are skipped by name; with CI=true they fail.
# As an argument, "venv" installs what Python's venv needs instead, and "redis" a Redis server.
set -u
POLICY=/usr/sbin/policy-rc.d

missing() {
    if [ "${1:-}" = venv ]; then
        echo python3-venv
        return
    fi
    command -v redis-server >/dev/null || echo redis-server
    [ "${1:-}" = redis ] && return
    command -v chromium >/dev/null || command -v google-chrome >/dev/null || echo chromium
    command -v nginx >/dev/null || [ -x /usr/sbin/nginx ] || echo nginx-light
    command -v haproxy >/dev/null || [ -x /usr/sbin/haproxy ] || echo haproxy
    command -v caddy >/dev/null || echo caddy
    # The program and its modules; the package apache2 would add the service.
    command -v httpd >/dev/null || [ -x /usr/sbin/apache2 ] || echo apache2-bin
    command -v curl >/dev/null || echo curl
    command -v openssl >/dev/null || echo openssl
    command -v node >/dev/null || echo nodejs
    command -v npm >/dev/null || echo npm
    # Playwright brings a Node of its own, which needs it.
    ldconfig -p 2>/dev/null | grep -q 'libatomic\.so\.1' || echo libatomic1
}

as_root() {
    if [ "$(id -u)" = 0 ]; then "$@"; else sudo -n "$@"; fi
}

# Has the packages that are being installed start nothing: nginx and Caddy both want port 80.
forbid_services() {
    [ -e "$POLICY" ] && return 0
    printf '#!/bin/sh\nexit 101\n' | as_root tee "$POLICY" >/dev/null && as_root chmod 755 "$POLICY"
    trap 'as_root rm -f "$POLICY"' EXIT
    trap 'exit 1' INT TERM
}

# Nor at the next boot.
disable_services() {
    [ -d /run/systemd/system ] || return 0
    for service in redis-server nginx haproxy caddy; do
        case " $1" in
            *" $service"*) as_root systemctl disable --quiet "$service" || true ;;
        esac
    done
}

install_packages() {
    packages=$(missing "$@" | tr '\n' ' ')
    [ -n "$packages" ] || return 0
    command -v apt-get >/dev/null || { echo "Not installed, no apt-get: $packages"; return 0; }
    echo "Installing $packages"
    forbid_services
    as_root apt-get update -qq
    # shellcheck disable=SC2086  # a list of names
    as_root env DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends $packages \
        >/dev/null || echo "Could not install $packages; tests that need them are skipped."
    disable_services "$packages"
}

install_clients() {
    [ -z "${1:-}" ] && command -v npm >/dev/null || return 0
    clients=$(dirname "$0")/clients
    [ "$clients/node_modules/.package-lock.json" -nt "$clients/package.json" ] && return 0
    npm install --prefix "$clients" --no-package-lock --no-audit --no-fund --loglevel=error \
        || echo "Could not install the npm clients; tests that need them are skipped."
}

# Datastar is not on npm since its version 1. This package has it, all but unchanged.
install_datastar() {
    [ -z "${1:-}" ] || return 0
    datastar=$(dirname "$0")/clients/datastar
    [ -e "$datastar/datastar-core.js" ] && return 0
    python=$(dirname "$0")/../.venv/bin/python
    [ -x "$python" ] || python=python3
    wheels=$(mktemp -d)
    "$python" -m pip download --quiet --disable-pip-version-check --no-deps --only-binary=:all: \
        --python-version 3.12 --dest "$wheels" starhtml==0.7.0 \
        && "$python" -m zipfile -e "$wheels"/starhtml-*.whl "$wheels" \
        && mkdir -p "$datastar" && cp "$wheels/starhtml/static/js/datastar-core.js" "$datastar" \
        || echo "Could not get Datastar; tests that need it are skipped."
    rm -r "$wheels"
}

install_packages "$@"
install_clients "$@"
install_datastar "$@"
