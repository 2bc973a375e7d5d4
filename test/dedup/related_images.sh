#!/usr/bin/env bash
# Two builds of the same Debian release, the second with a few more packages.
#
#     related_images.sh prepare         # builds them in the cache, where they are missing
#     related_images.sh run PROGRAM     # runs PROGRAM with STELLARIUM_IMAGE_A and _B set
set -euo pipefail
root=$(realpath "$(dirname "$0")/../..")

image_a=${STELLARIUM_IMAGE_A:-$("$root/scripts/guests/build-image.sh" debian -)}
image_b=${STELLARIUM_IMAGE_B:-$("$root/scripts/guests/build-image.sh" debian-more - \
    nginx-light sqlite3 rsync tmux jq)}

case ${1:-} in
    prepare) ;;
    run) STELLARIUM_IMAGE_A=$image_a STELLARIUM_IMAGE_B=$image_b exec "${@:2}" ;;
    *)
        sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' "$0" >&2
        exit 2
        ;;
esac
