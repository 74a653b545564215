//! What tests of `image` share: running it, and looking into what it wrote.

use std::fs;
use std::path::Path;
use std::process::Command;

use serde_json::Value;

use crate::oci::Image;
use crate::repo::OstreeRepo;
use crate::{aggregator, ok, tool};

/// The ref of the tests' commits.
pub const REF: &str = "demo/x86_64/host";

/// `image` of the repository at `repo` into `output`, which prints JSON.
pub fn image(repo: &Path, output: &str) -> Command {
    let mut command = aggregator();
    command.args(["image", "--output-format", "json", "--repo"]).arg(repo).args(["--output", output]);
    command
}

/// What `skopeo` prints with these arguments.
#[track_caller]
pub fn skopeo(arguments: &[&str]) -> Value {
    let done = ok(tool("skopeo").args(arguments));
    serde_json::from_str(&done.stdout).expect("skopeo prints JSON")
}

/// Paths below `root`, as `find` prints them.
pub fn listing(root: &Path) -> Vec<String> {
    let done = ok(tool("find").arg(root).args(["-mindepth", "1", "-printf", "%P\n"]));
    let mut lines: Vec<String> = done.stdout.lines().map(str::to_owned).collect();
    lines.sort();
    lines
}

/// The strings of a list.
pub fn strings(value: &Value) -> impl Iterator<Item = &str> {
    value.as_array().into_iter().flatten().filter_map(Value::as_str)
}

/// docs/image.md: the index alone gives the size of its layer.
#[track_caller]
pub fn assert_size_follows_from(index: &Value, layer: &Path) {
    let own = serde_json::to_vec(index).unwrap().len() as u64 + 1;
    let objects = index["objects"].as_object().unwrap().values().cloned();
    let files = index["files"].as_array().unwrap().iter().map(|file| file["size"].clone());
    let content: u64 = objects.chain(files).map(|size| 512 + size.as_u64().unwrap().next_multiple_of(512)).sum::<u64>();
    let directories = 512 * index["directories"].as_array().unwrap().len() as u64;
    let tar = 512 + own.next_multiple_of(512) + content + directories + 1024;
    assert_eq!(fs::metadata(layer).unwrap().len(), 10 + tar + 5 * (tar / 65_535 + 1) + 8);
}

/// The layers of the image at `reference`, by digest.
#[track_caller]
pub fn layers(reference: &str) -> Vec<String> {
    strings(&skopeo(&["inspect", reference])["Layers"]).map(str::to_owned).collect()
}

/// The repository of the image in the layout at `out`, as a container has it.
#[track_caller]
pub fn unpack(out: &Path, root: &Path) -> OstreeRepo {
    let image = Image::read(out);
    fs::create_dir(root).unwrap();
    for tar in image.layers {
        fs::write(root.join("tar"), tar).unwrap();
        ok(tool("tar").arg("-C").arg(root).arg("-xpf").arg(root.join("tar")));
    }
    OstreeRepo::at(root.join("srv/repo"))
}
