//! A treefile with all that it includes, as ConfigMaps, and the volume that puts the
//! files back where they were.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Component, Path, PathBuf};

use anyhow::{Context, Result};
use k8s_openapi::ByteString;
use k8s_openapi::api::core::v1::{ConfigMap, ConfigMapProjection, KeyToPath, ProjectedVolumeSource, VolumeProjection};
use kube::api::ObjectMeta;
use oscontainer_artifact::digest::Digest;
use oscontainer_program::reject;

use super::template::labels;
use crate::treefile::{self, Machine};

/// Bytes in one ConfigMap: the API takes 1 MiB, with names and all (core/v1, ConfigMap).
const MAX_MAP: usize = 900 << 10;
/// Bytes in all: they lie in the cluster's database.
const MAX_ALL: usize = 8 << 20;
/// How many of the biggest files an error names.
const NAMED: usize = 5;
/// The longest key (Kubernetes, IsConfigMapKey).
const MAX_KEY: usize = 253;

/// The files that a compose needs.
#[derive(Debug)]
pub struct Bundle {
    /// Where the treefile is among them: a relative path.
    pub treefile: String,
    files: Vec<File>,
}

#[derive(Debug)]
struct File {
    /// Relative to the directory that all files are below.
    path: String,
    content: Vec<u8>,
    executable: bool,
}

impl Bundle {
    /// The treefile at `path` for `machine`, what it includes and refers to, and the .repo
    /// files beside it.
    ///
    /// # Errors
    /// Rejected as the treefile itself is, and when it is too large.
    pub fn read(path: &Path, machine: &Machine) -> Result<Self> {
        let flattened = treefile::load(path, machine)?;
        let external = flattened.external;
        let mut paths = flattened.sources;
        paths.extend(external.add_files.into_iter().map(|(source, _)| source));
        paths.extend(external.postprocess_scripts);
        paths.extend(external.passwd);
        paths.extend(external.group);
        paths.extend(external.finalize);
        paths.extend(repositories(&external.directory)?);
        let mut paths = paths.iter().map(|path| absolute(path)).collect::<Result<Vec<_>>>()?;
        paths.sort();
        paths.dedup();
        let treefile = absolute(path)?;
        let root = paths.iter().fold(treefile.as_path(), |root, path| common(root, path)).to_owned();
        let relative = |path: &Path| -> Result<String> {
            let below = path.strip_prefix(&root).unwrap_or(path);
            match below.to_str() {
                Some(text) => Ok(text.to_owned()),
                None => reject!("{}: a ConfigMap takes no name that is not UTF-8", path.display()),
            }
        };
        let mut files = Vec::new();
        for path in &paths {
            let reading = || format!("reading {}", path.display());
            let content = fs::read(path).with_context(reading)?;
            let executable = fs::metadata(path).with_context(reading)?.permissions().mode() & 0o111 != 0;
            files.push(File { path: relative(path)?, content, executable });
        }
        let bundle = Self { treefile: relative(&treefile)?, files };
        bundle.check()?;
        Ok(bundle)
    }

    /// That it fits.
    fn check(&self) -> Result<()> {
        let total: usize = self.files.iter().map(File::size).sum();
        let largest = self.files.iter().map(File::size).max().unwrap_or_default();
        if total <= MAX_ALL && largest <= MAX_MAP {
            return Ok(());
        }
        let mut files: Vec<_> = self.files.iter().collect();
        files.sort_by_key(|file| std::cmp::Reverse(file.size()));
        let named: Vec<_> =
            files.iter().take(NAMED).map(|file| format!("{} ({} KiB)", file.path, file.size() >> 10)).collect();
        let hint = "put such files into a package; the biggest are";
        match total > MAX_ALL {
            true => reject!(
                "the treefile and its files have {} KiB, and {} may be submitted: {hint} {}",
                total >> 10,
                MAX_ALL >> 10,
                named.join(", ")
            ),
            false => reject!("a file may have {} KiB in a ConfigMap: {hint} {}", MAX_MAP >> 10, named.join(", ")),
        }
    }

    /// The ConfigMaps, named `NAME-0` and so on, and the volume that has the files in it.
    pub fn config_maps(&self, name: &str, namespace: &str) -> (Vec<ConfigMap>, ProjectedVolumeSource) {
        let mut maps: Vec<(Vec<&File>, usize)> = Vec::new();
        for file in &self.files {
            match maps.last_mut() {
                Some((files, size)) if *size + file.size() <= MAX_MAP => {
                    files.push(file);
                    *size += file.size();
                }
                _ => maps.push((vec![file], file.size())),
            }
        }
        let named = maps.iter().enumerate().map(|(number, (files, _))| (format!("{name}-{number}"), files));
        let (maps, sources) =
            named.map(|(name, files)| (config_map(&name, namespace, files), projection(&name, files))).unzip();
        let volume = ProjectedVolumeSource { sources: Some(sources), default_mode: Some(0o444) };
        (maps, volume)
    }
}

impl File {
    /// Bytes that it takes in a ConfigMap.
    fn size(&self) -> usize {
        let content = match self.text() {
            Some(text) => text.len(),
            None => self.content.len().div_ceil(3) * 4,
        };
        content + self.key().len()
    }

    fn text(&self) -> Option<&str> {
        str::from_utf8(&self.content).ok()
    }

    /// The path as a key, `[-._a-zA-Z0-9]+`: `__` for a slash, `_XX` for other letters.
    fn key(&self) -> String {
        let mut key = String::new();
        for (place, byte) in self.path.bytes().enumerate() {
            match byte {
                b'/' => key.push_str("__"),
                // Neither `..` nor what starts so is a key.
                b'.' if place == 0 => key.push_str("_2E"),
                b'-' | b'.' | b'0'..=b'9' | b'A'..=b'Z' | b'a'..=b'z' => key.push(char::from(byte)),
                other => key.push_str(&format!("_{other:02X}")),
            }
        }
        if key.len() > MAX_KEY {
            let digest = Digest::of(self.path.as_bytes()).hex();
            key.truncate(MAX_KEY - digest.len());
            key.push_str(&digest);
        }
        key
    }
}

fn config_map(name: &str, namespace: &str, files: &[&File]) -> ConfigMap {
    let (text, binary): (Vec<&File>, Vec<&File>) = files.iter().copied().partition(|file| file.text().is_some());
    let data: BTreeMap<_, _> =
        text.into_iter().map(|file| (file.key(), file.text().unwrap_or_default().to_owned())).collect();
    let binary: BTreeMap<_, _> =
        binary.into_iter().map(|file| (file.key(), ByteString(file.content.clone()))).collect();
    ConfigMap {
        metadata: ObjectMeta {
            name: Some(name.to_owned()),
            namespace: Some(namespace.to_owned()),
            labels: Some(labels("treefile")),
            ..ObjectMeta::default()
        },
        immutable: Some(true),
        data: (!data.is_empty()).then_some(data),
        binary_data: (!binary.is_empty()).then_some(binary),
    }
}

fn projection(name: &str, files: &[&File]) -> VolumeProjection {
    let items = files.iter().map(|file| KeyToPath {
        key: file.key(),
        path: file.path.clone(),
        mode: Some(if file.executable { 0o555 } else { 0o444 }),
    });
    let config_map = ConfigMapProjection { name: name.to_owned(), items: Some(items.collect()), optional: None };
    VolumeProjection { config_map: Some(config_map), ..VolumeProjection::default() }
}

/// The .repo files in a directory.
fn repositories(directory: &Path) -> Result<Vec<PathBuf>> {
    let listing = || format!("listing {}", directory.display());
    let mut found = Vec::new();
    for entry in fs::read_dir(directory).with_context(listing)? {
        let path = entry.with_context(listing)?.path();
        if path.extension().is_some_and(|extension| extension == "repo") && path.is_file() {
            found.push(path);
        }
    }
    Ok(found)
}

/// An absolute path without `.` and `..`; links stay, for a file has its name.
fn absolute(path: &Path) -> Result<PathBuf> {
    let path = std::path::absolute(path).with_context(|| format!("finding {}", path.display()))?;
    let mut clean = PathBuf::new();
    for component in path.components() {
        match component {
            // What `..` leads to depends on links.
            Component::ParentDir => {
                let parent = clean.parent().unwrap_or(&clean).to_owned();
                let resolved = fs::canonicalize(&clean).unwrap_or_else(|_| clean.clone());
                clean = resolved.parent().map_or(parent, Path::to_owned);
            }
            other => clean.push(other),
        }
    }
    Ok(clean)
}

/// The deepest directory that both are below.
fn common<'a>(root: &'a Path, path: &Path) -> &'a Path {
    let above = |candidate: &&Path| path.starts_with(candidate) && **candidate != *path;
    root.ancestors().find(above).unwrap_or(Path::new("/"))
}
