//! From the first treefile to one whole: reads the files, follows the includes,
//! merges, substitutes, and finds what lies beside each file.

use std::collections::HashMap;
use std::fmt::Write;
use std::fs;
use std::io::{ErrorKind, Read};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Component, Path, PathBuf};

use anyhow::{Context, Result};
use oscontainer_artifact::Rejected;
use oscontainer_program::reject;

use super::condition::{VARIABLE_SIGNS, Variable, Variables, substitute};
use super::fields::{Treefile, join};
use super::kickstart::Kickstart;
use super::origin::Origins;
use super::parse::{self, Included, Parsed};
use super::source::{self, Format, Problem, Source};
use super::types::{CheckGroups, CheckPasswd, ReleaseVer};
use super::{External, Flattened, Machine};

/// Includes in includes; rpm-ostree's limit too.
const DEPTH_LIMIT: usize = 50;

/// Bytes of one treefile; the largest public one has some 60 KiB.
const SIZE_LIMIT: u64 = 1 << 20;

/// Mistakes and warnings that are listed of one file; of one larger than [`EASY_SIZE`], one.
const LISTED: usize = 20;

/// Bytes of a treefile that is soon read again for the place of each mistake.
const EASY_SIZE: usize = 64 << 10;

/// Reads the treefile at `path` and all that it includes, as they hold on `machine`.
///
/// # Errors
/// [`Rejected`], naming file, line, column and field, for whatever is wrong with a
/// treefile and for files that are missing; other errors where reading fails.
pub fn load(path: &Path, machine: &Machine) -> Result<Flattened> {
    let mut loader = Loader { machine, seen: HashMap::new(), sources: Vec::new(), variables: Variables::new() };
    let Flattened { mut treefile, external, origins, .. } = loader.read(path, 0)?;
    if let Some(Variable::Text(version)) = loader.variables.get("releasever")
        && let Some(sign) = VARIABLE_SIGNS.into_iter().find(|&sign| version.contains(sign))
    {
        reject!("{}: releasever: {version:?} cannot have {sign:?} in it", origins.of("releasever"));
    }
    substitute_all(&mut treefile, &loader.variables);
    treefile.variables = None;
    Ok(Flattened { treefile, external, sources: loader.sources, origins })
}

/// Device and inode of each file read, and its name.
type Seen = HashMap<(u64, u64), PathBuf>;

/// What is known on the way through the includes.
struct Loader<'a> {
    machine: &'a Machine,
    /// The treefiles read.
    seen: Seen,
    sources: Vec<PathBuf>,
    variables: Variables,
}

impl Loader<'_> {
    /// One file with what it includes; the sources are the loader's.
    fn read(&mut self, path: &Path, depth: usize) -> Result<Flattened> {
        let directory = directory(path);
        let text = read_once(path, "treefile", &mut self.seen)?;
        self.sources.push(path.to_owned());
        if path.extension().is_some_and(|extension| extension == "ks") {
            let mut seen = Seen::from([(identity(&existing_file(path, "treefile")?), path.to_owned())]);
            let treefile = self.read_kickstart(path, &directory, &text, &mut seen)?.into_treefile();
            let external = External { directory, ..External::default() };
            return Ok(Flattened { treefile, external, sources: Vec::new(), origins: Origins::default() });
        }
        let format = match path.extension().and_then(|extension| extension.to_str()) {
            Some("yaml" | "yml") => Format::Yaml,
            _ => Format::Json,
        };
        let Parsed { mut treefile, mut includes, conditional, places, .. } =
            parse_text(path, &text, format, self.machine)?;
        let mut origins = Origins::new(path, places);
        if depth == 0
            && let Some(version) = &self.machine.releasever
        {
            treefile.releasever = Some(ReleaseVer::Text(version.clone()));
            self.variables.insert("releasever".to_owned(), Variable::Text(version.clone()));
        }
        // What an includer set stays; conditions see this file's variables and those
        // of files read before, not those of files it includes.
        let mut variables = Some(std::mem::take(&mut self.variables));
        join(&mut variables, treefile.variables.take());
        self.variables = variables.unwrap_or_default();

        let mut problems = Vec::new();
        for item in conditional {
            let mut holds = true;
            for (place, condition) in &item.conditions {
                match condition.holds(&self.variables) {
                    Ok(this) => holds &= this,
                    Err(message) => problems.push(Problem { path: place.clone(), at_key: false, message }),
                }
            }
            match item.included {
                _ if !holds => {}
                Included::Files(files) => includes.extend(files),
                Included::Inline(inline, places) => {
                    treefile.include(*inline);
                    origins.include(Origins::new(path, places));
                }
            }
        }
        if !problems.is_empty() {
            return Err(rejected(path, &text, problems).into());
        }
        let mut external = find_external(path, directory, &treefile)?;
        if !includes.is_empty() && depth == DEPTH_LIMIT {
            reject!("{}: includes go deeper than {DEPTH_LIMIT} files", path.display());
        }
        for include in includes {
            let included = external.directory.join(&include);
            let inner = self
                .read(&included, depth + 1)
                .with_context(|| format!("including {include} from {}", path.display()))?;
            merge_external(&treefile, &mut external, inner.external);
            treefile.include(inner.treefile);
            origins.include(inner.origins);
        }
        Ok(Flattened { treefile, external, sources: Vec::new(), origins })
    }

    /// Reads the kickstart file `path` and those it includes, all below `directory`. Those
    /// may be included by another one too.
    fn read_kickstart(&mut self, path: &Path, directory: &Path, text: &str, seen: &mut Seen) -> Result<Kickstart> {
        let mut kickstart = match Kickstart::parse(text) {
            Ok(kickstart) => kickstart,
            Err((line, message)) => reject!("{}:{line}: {message}", path.display()),
        };
        if seen.len() > 256 {
            reject!("{}: more than 256 files are included", path.display());
        }
        for include in std::mem::take(&mut kickstart.includes) {
            if !Path::new(&include).components().all(|part| matches!(part, Component::Normal(_) | Component::CurDir)) {
                reject!("{}: %include {include}: must be a path below {}", path.display(), directory.display());
            }
            let included = directory.join(&include);
            let text = read_once(&included, "kickstart file", seen)?;
            self.sources.push(included.clone());
            kickstart.include(self.read_kickstart(&included, directory, &text, seen)?);
        }
        Ok(kickstart)
    }
}

/// What tells a file from others, whatever its name.
fn identity(metadata: &fs::Metadata) -> (u64, u64) {
    (metadata.dev(), metadata.ino())
}

/// Reads a file that may be read only once.
fn read_once(path: &Path, what: &str, seen: &mut Seen) -> Result<String> {
    let metadata = existing_file(path, what)?;
    if metadata.len() > SIZE_LIMIT {
        reject!("{}: a {what} may have {SIZE_LIMIT} bytes, this has {}", path.display(), metadata.len());
    }
    if let Some(before) = seen.insert(identity(&metadata), path.to_owned()) {
        let same = if before == path { String::new() } else { format!(" (as {})", before.display()) };
        reject!("{}: included twice{same}; move what both need into the file that includes both", path.display());
    }
    let mut bytes = Vec::new();
    let file = fs::File::open(path).with_context(|| format!("opening {}", path.display()))?;
    file.take(SIZE_LIMIT).read_to_end(&mut bytes).with_context(|| format!("reading {}", path.display()))?;
    match String::from_utf8(bytes) {
        Ok(text) => Ok(text),
        Err(error) => reject!("{}: not UTF-8 at byte {}", path.display(), error.utf8_error().valid_up_to()),
    }
}

/// The directory that a treefile's paths are relative to.
fn directory(path: &Path) -> PathBuf {
    match path.parent() {
        Some(parent) if parent != Path::new("") => parent.to_owned(),
        _ => PathBuf::from("."),
    }
}

/// The metadata of a file that must be there, and must be an ordinary file: a pipe
/// would be waited for, and a device never ends.
fn existing_file(path: &Path, what: &str) -> Result<fs::Metadata> {
    match fs::metadata(path) {
        Ok(metadata) if metadata.is_file() => Ok(metadata),
        Ok(_) => reject!("{}: the {what} is not a file", path.display()),
        Err(error) if matches!(error.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory) => {
            reject!("{}: the {what} does not exist", path.display())
        }
        Err(error) if error.kind() == ErrorKind::PermissionDenied => {
            reject!("{}: the {what} cannot be read: permission denied", path.display())
        }
        Err(error) => Err(error).with_context(|| format!("reading {}", path.display())),
    }
}

fn parse_text(path: &Path, text: &str, format: Format, machine: &Machine) -> Result<Parsed> {
    let Source { value, repeated } = match source::parse(text, format, parse::below) {
        Ok(source) => source,
        Err(error) => {
            let place = error.place.map(|(line, column)| format!(":{line}:{column}")).unwrap_or_default();
            reject!("{}{place}: {}", path.display(), error.message.replace('\n', " "));
        }
    };
    let parsed = parse::parse(&value, format, &machine.basearch).map_err(|problems| rejected(path, text, problems))?;
    // Comments in JSON are keys that may come often.
    let counts = |key: &&String| format == Format::Yaml || key.starts_with(parse::ARCH_PACKAGES);
    for key in repeated.iter().filter(counts).take(LISTED) {
        tracing::warn!("{}: {key:?} is given twice: the last counts", path.display());
    }
    for Problem { message, .. } in parsed.ignored.iter().take(LISTED) {
        tracing::warn!("{}: conditional-include: {message}", path.display());
    }
    Ok(parsed)
}

/// All that is wrong with one file, in one line.
fn rejected(path: &Path, text: &str, problems: Vec<Problem>) -> Rejected {
    // Each place takes a walk through the text.
    let listed = if text.len() > EASY_SIZE { 1 } else { LISTED };
    let more = problems.len().saturating_sub(listed);
    let place = |problem: &Problem| source::locate(text, &problem.path, problem.at_key);
    let mut placed: Vec<_> = problems.into_iter().take(listed).map(|problem| (place(&problem), problem)).collect();
    placed.sort_by_key(|(place, _)| *place);
    let mut lines = Vec::new();
    for (place, problem) in placed {
        let mut line = path.display().to_string();
        if let Some((row, column)) = place {
            // Writing to a string cannot fail.
            let _ = write!(line, ":{row}:{column}");
        }
        let field = match problem.at_key {
            true => field_name(&problem.path[..problem.path.len() - 1]),
            false => field_name(&problem.path),
        };
        let message = problem.message.replace('\n', "\\n");
        lines.push(if field.is_empty() { format!("{line}: {message}") } else { format!("{line}: {field}: {message}") });
    }
    if more > 0 {
        lines.push(format!("and {more} more"));
    }
    Rejected::new(lines.join("; "))
}

/// `conditional-include[1].if`
fn field_name(path: &[source::Step]) -> String {
    let mut name = String::new();
    for step in path {
        match step {
            source::Step::Key(key) if name.is_empty() => name.push_str(key),
            source::Step::Key(key) => name.extend([".", key]),
            source::Step::Index(index) => name.push_str(&format!("[{index}]")),
        }
    }
    name
}

/// What one treefile's fields refer to in its directory; all of it must exist.
fn find_external(path: &Path, directory: PathBuf, treefile: &Treefile) -> Result<External> {
    let beside = |name: &str, field: &str| -> Result<PathBuf> {
        let file = directory.join(name);
        existing_file(&file, &format!("{field} of {}", path.display()))?;
        Ok(file)
    };
    let add_files = treefile
        .add_files
        .iter()
        .flatten()
        .map(|(name, target)| Ok((beside(name, "add-files")?, target.clone())))
        .collect::<Result<_>>()?;
    let postprocess_scripts =
        treefile.postprocess_script.iter().map(|name| beside(name, "postprocess-script")).collect::<Result<_>>()?;
    let passwd = match &treefile.check_passwd {
        Some(CheckPasswd::File { filename }) => Some(beside(filename, "check-passwd")?),
        _ => None,
    };
    let group = match &treefile.check_groups {
        Some(CheckGroups::File { filename }) => Some(beside(filename, "check-groups")?),
        _ => None,
    };
    let finalize = find_finalizers(&directory)?;
    Ok(External { directory, add_files, postprocess_scripts, passwd, group, finalize })
}

/// The executables in `finalize.d`, by name.
fn find_finalizers(directory: &Path) -> Result<Vec<PathBuf>> {
    let finalizers = directory.join("finalize.d");
    let entries = match fs::read_dir(&finalizers) {
        Ok(entries) => entries,
        Err(error) if matches!(error.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory) => return Ok(Vec::new()),
        Err(error) => return Err(error).with_context(|| format!("listing {}", finalizers.display())),
    };
    let mut found = Vec::new();
    for entry in entries {
        let entry = entry.with_context(|| format!("listing {}", finalizers.display()))?;
        let metadata = entry.metadata().with_context(|| format!("reading {}", entry.path().display()))?;
        if metadata.is_file() && metadata.permissions().mode() & 0o100 != 0 {
            found.push(entry.path());
        }
    }
    found.sort();
    Ok(found)
}

/// Merges what lies beside an included treefile, as its fields will be merged into
/// `treefile`, which has only its own and earlier includes' fields yet.
fn merge_external(treefile: &Treefile, external: &mut External, included: External) {
    let mut add_files = included.add_files;
    add_files.append(&mut external.add_files);
    external.add_files = add_files;
    if treefile.postprocess_script.is_none() {
        external.postprocess_scripts = included.postprocess_scripts;
    }
    if treefile.check_passwd.is_none() {
        external.passwd = included.passwd;
    }
    if treefile.check_groups.is_none() {
        external.group = included.group;
    }
    external.finalize.extend(included.finalize);
    // One of a name counts, the last that is read; all run in the order of their names.
    external.finalize.reverse();
    external.finalize.sort_by_key(|path| path.file_name().map(ToOwned::to_owned));
    external.finalize.dedup_by_key(|path| path.file_name().map(ToOwned::to_owned));
}

/// Replaces variables in the fields that may have them.
fn substitute_all(treefile: &mut Treefile, variables: &Variables) {
    let substitute_in = |text: &mut String| *text = substitute(text, variables);
    let Treefile { treeref, automatic_version_prefix, mutate_os_release, platform_module, .. } = treefile;
    for text in [treeref, automatic_version_prefix, mutate_os_release, platform_module].into_iter().flatten() {
        substitute_in(text);
    }
    if let Some(rojig) = &mut treefile.rojig {
        substitute_in(&mut rojig.name);
        substitute_in(&mut rojig.summary);
        rojig.description.as_mut().map(substitute_in);
    }
    let maps = [&mut treefile.metadata, &mut treefile.add_commit_metadata];
    for value in maps.into_iter().flatten().flat_map(|map| map.values_mut()) {
        if let serde_json::Value::String(text) = value {
            substitute_in(text);
        }
    }
}
