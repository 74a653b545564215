//! OCI layouts that tests change in any place, with every digest still right.

use std::fs;
use std::path::{Path, PathBuf};

use oscontainer_artifact::digest::Digest;
use serde_json::Value;

use crate::{ok, tool};

/// Bytes in a stored deflate block (docs/image.md).
const BLOCK: usize = 65_535;

/// An image, taken apart.
pub struct Image {
    /// The manifest; layers and config in it are set when it is written.
    pub manifest: Value,
    /// The config; its diff IDs are set when it is written.
    pub config: Value,
    /// The layers' tars.
    pub layers: Vec<Vec<u8>>,
}

impl Image {
    /// Reads the first image of the layout at `root`.
    pub fn read(root: &Path) -> Self {
        let index = json(&root.join("index.json"));
        let manifest = json(&blob(root, &index["manifests"][0]));
        let config = json(&blob(root, &manifest["config"]));
        let layers = manifest["layers"].as_array().expect("a manifest has layers");
        let layers = layers.iter().map(|layer| content(&blob(root, layer))).collect();
        Self { manifest, config, layers }
    }

    /// Replaces `from`, which is there once, by `to`, as long, in the tar of layer `number`.
    #[track_caller]
    pub fn replace(&mut self, number: usize, from: &str, to: &str) {
        assert_eq!(from.len(), to.len());
        let tar = &mut self.layers[number];
        let found = tar.windows(from.len()).position(|window| window == from.as_bytes());
        let start = found.unwrap_or_else(|| panic!("{from:?} is not in layer {number}"));
        tar[start..start + to.len()].copy_from_slice(to.as_bytes());
    }

    /// Writes it as the only image of a new layout at `root`.
    pub fn write(mut self, root: &Path) {
        fs::create_dir_all(root.join("blobs/sha256")).expect("the test's directory can be written");
        let store = |descriptor: &mut Value, bytes: &[u8]| {
            descriptor["digest"] = Digest::of(bytes).to_string().into();
            descriptor["size"] = bytes.len().into();
            fs::write(blob(root, descriptor), bytes).expect("the test's directory can be written");
        };
        let mut layer = self.manifest["layers"][0].clone();
        let (mut layers, mut diff_ids) = (Vec::new(), Vec::new());
        for tar in &self.layers {
            store(&mut layer, &stored_gzip(tar));
            layers.push(layer.clone());
            diff_ids.push(Value::from(Digest::of(tar).to_string()));
        }
        self.manifest["layers"] = layers.into();
        if let Some(list) = self.config["rootfs"]["diff_ids"].as_array_mut().filter(|list| !list.is_empty()) {
            *list = diff_ids;
        }
        store(&mut self.manifest["config"], self.config.to_string().as_bytes());
        let mut entry = serde_json::json!({"mediaType": self.manifest["mediaType"]});
        store(&mut entry, self.manifest.to_string().as_bytes());
        let index = serde_json::json!({"schemaVersion": 2, "manifests": [entry]});
        fs::write(root.join("index.json"), index.to_string()).expect("the test's directory can be written");
        fs::write(root.join("oci-layout"), r#"{"imageLayoutVersion":"1.0.0"}"#)
            .expect("the test's directory can be written");
    }
}

/// The blob that a descriptor names, in the layout at `root`.
pub fn blob(root: &Path, descriptor: &Value) -> PathBuf {
    let digest = descriptor["digest"].as_str().expect("a descriptor has a digest");
    root.join("blobs/sha256").join(digest.strip_prefix("sha256:").expect("sha256 is used"))
}

/// A file as JSON.
#[track_caller]
pub fn json(path: &Path) -> Value {
    serde_json::from_slice(&fs::read(path).expect("the file is there")).expect("it is JSON")
}

/// What gzip makes of a blob.
fn content(path: &Path) -> Vec<u8> {
    let out = path.with_extension("tar");
    ok(tool("sh").args(["-c", "gzip -dc \"$0\" >\"$1\""]).arg(path).arg(&out));
    let bytes = fs::read(&out).expect("gzip wrote it");
    fs::remove_file(out).expect("the test's directory can be written");
    bytes
}

/// The gzip file of stored blocks that docs/image.md describes.
fn stored_gzip(content: &[u8]) -> Vec<u8> {
    let mut file = vec![0x1f, 0x8b, 8, 0, 0, 0, 0, 0, 0, 255];
    let mut frame = |block: &[u8], last: bool| {
        let length = block.len() as u16;
        file.push(u8::from(last));
        file.extend_from_slice(&length.to_le_bytes());
        file.extend_from_slice(&(!length).to_le_bytes());
        file.extend_from_slice(block);
    };
    let blocks = content.chunks_exact(BLOCK);
    let rest = blocks.remainder();
    blocks.for_each(|block| frame(block, false));
    frame(rest, true);
    file.extend_from_slice(&crc32fast::hash(content).to_le_bytes());
    file.extend_from_slice(&(content.len() as u32).to_le_bytes());
    file
}
