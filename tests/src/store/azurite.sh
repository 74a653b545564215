#!/bin/bash
# Azure Blob Storage: Microsoft's emulator Azurite, in memory: azurite.sh DIR PORT MODULES. It ends with
# its standard input, and removes DIR.
set -eu
dir=$1 port=$2 modules=$3
cd "$dir"
node "$modules/node_modules/azurite/dist/src/blob/main.js" --inMemoryPersistence --blobPort "$port" \
  --silent --disableTelemetry < /dev/null & child=$!
trap 'kill -9 $child; rm -rf "$dir"' EXIT
cat > /dev/null
