# shellcheck shell=bash
# For the batch scripts: `srun OPTIONS "${python[@]}" FILE ARGUMENTS` runs Python on the nodes, in the container if
# CONTAINER_IMAGE names one (pyxis and enroot).

# shellcheck disable=SC2034 # is used by who sources this
python=(bash -c 'source slurm/env.sh && exec python "$@"' bash)
if [[ ${CONTAINER_IMAGE:-} ]]; then
  mounts=$PWD:$PWD${CONTAINER_MOUNTS:+,$CONTAINER_MOUNTS}
  python=(--container-image="$CONTAINER_IMAGE" --container-mounts="$mounts" --container-workdir="$PWD" "${python[@]}")
fi
