//! One treefile's text to its fields, includes and variables; no file is read here.

use std::collections::{BTreeMap, BTreeSet};

use serde_json::Value;

use super::condition::{Condition, VARIABLE_SIGNS, Variable, Variables};
use super::decode::{Decode, Problems, nearest};
use super::fields::{FIELDS, Merging, Treefile};
use super::source::{Format, Keys, Problem, Step};
use super::types::{BootLocation, CheckGroups, CheckPasswd, Edition};

/// Fields that say what else to read.
pub const INCLUDES: [&str; 3] = ["include", "arch-include", "conditional-include"];

/// Old names that are still taken. (`bootstrap_packages` is in rpm-ostree's
/// documentation, but its programs refuse it.)
pub const ALIASES: [(&str, &str); 4] = [
    ("gpg_key", "gpg-key"),
    ("boot_location", "boot-location"),
    ("default_target", "default-target"),
    ("automatic_version_prefix", "automatic-version-prefix"),
];

/// Mistakes in one file beyond which near names are not looked for.
const HINTED: usize = 50;

/// What precedes an architecture's name in a field of packages.
pub const ARCH_PACKAGES: &str = "packages-";

/// One treefile by itself.
#[derive(Debug, Default)]
pub struct Parsed {
    /// Its own fields.
    pub treefile: Treefile,
    /// Files to include, from its directory: its `include`, then its `arch-include`.
    pub includes: Vec<String>,
    /// Its `conditional-include`, in order.
    pub conditional: Vec<Conditional>,
    /// Where in it each field stands.
    pub places: Places,
    /// What in it has no effect.
    pub ignored: Vec<Problem>,
}

/// Fields by name, and the ways to their keys from the top of a file.
pub type Places = Vec<(&'static str, Vec<Step>)>;

/// One item of `conditional-include`.
#[derive(Debug)]
pub struct Conditional {
    /// All must hold; each with its place.
    pub conditions: Vec<(Vec<Step>, Condition)>,
    /// What is included then.
    pub included: Included,
}

/// What a condition decides on.
#[derive(Debug)]
pub enum Included {
    /// Files, from the treefile's directory.
    Files(Vec<String>),
    /// Fields written on the spot.
    Inline(Box<Treefile>, Places),
}

/// What the keys below `key` are, which is itself one of `keys`; and whether `key` may be
/// given twice, so that the last counts: what rpm-ostree keeps as a mapping may.
pub fn below(keys: Keys, key: &str) -> (Keys, bool) {
    match (keys, key) {
        (Keys::Fields, "arch-include") => (Keys::Free, false),
        (Keys::Fields, "conditional-include") => (Keys::Conditional, false),
        (Keys::Fields, "include" | "bootstrap-packages") => (Keys::Parts, false),
        (Keys::Fields, name) => {
            let name = ALIASES.iter().find(|(old, _)| *old == name).map_or(name, |(_, new)| new);
            match FIELDS.iter().find(|field| field.name == name) {
                Some(field) if field.merging == Merging::join => (Keys::Free, false),
                Some(_) => (Keys::Parts, false),
                None => (Keys::Free, true),
            }
        }
        // Of `check-passwd` and `check-groups`.
        (Keys::Parts, "entries") => (Keys::Free, false),
        (Keys::Parts, _) => (Keys::Parts, false),
        (Keys::Conditional, "include") => (Keys::Fields, false),
        (Keys::Conditional, _) => (Keys::Conditional, false),
        (Keys::Free, _) => (Keys::Free, true),
    }
}

/// Reads the fields of `value`, a treefile, as they hold on `basearch`.
///
/// # Errors
/// All that is wrong with them.
pub fn parse(value: &Value, format: Format, basearch: &str) -> Result<Parsed, Vec<Problem>> {
    let mut problems = Problems::default();
    let mut parsed = Parsed::default();
    if value.is_object() {
        decode_includes(value, basearch, &mut parsed, &mut problems);
        decode_treefile(value, &Scope { format, basearch, inline: false }, &mut parsed.treefile, &mut problems);
        settle_variables(&mut parsed.treefile, basearch, &mut problems);
        parsed.places = places(value, &[]);
    } else if !value.is_null() || format == Format::Json {
        problems.unexpected(value, "a mapping of fields");
    }
    parsed.ignored = problems.take_ignored();
    let packages = parsed.treefile.packages.take().unwrap_or_default();
    parsed.treefile.packages = Some(packages);
    parsed.treefile.basearch = Some(basearch.to_owned());
    match problems.into_found() {
        found if found.is_empty() => Ok(parsed),
        found => Err(found),
    }
}

/// What a mapping of fields is.
struct Scope<'a> {
    format: Format,
    basearch: &'a str,
    /// In a `conditional-include`: then nothing is split or included.
    inline: bool,
}

fn decode_treefile(value: &Value, scope: &Scope<'_>, treefile: &mut Treefile, problems: &mut Problems) {
    let mut packages = BTreeSet::new();
    for (name, inner) in value.as_object().into_iter().flatten() {
        let alias = ALIASES.iter().find(|(old, _)| old == name);
        if let Some((old, new)) = alias {
            if inner.is_null() {
                continue;
            }
            if scope.inline {
                problems.ignore_key(old, format!("{old:?} has no effect here, as in rpm-ostree: write {new:?}"));
                continue;
            }
            if value.get(new).is_some_and(|other| !other.is_null()) {
                problems.note_key(old, format!("{old:?} is the old name of {new:?}, which is given too: keep one"));
            }
            let mut decoded = Problems::default();
            treefile.decode_field(new, inner, &mut decoded);
            for problem in decoded.into_found() {
                problems.at(old, |problems| problems.note(problem.message));
            }
        } else if name == "bootstrap-packages" {
            packages.extend(problems.at(name, |problems| optional_names(inner, problems)));
        } else if scope.inline && (INCLUDES.contains(&name.as_str()) || name == "variables") {
            problems.note_key(name, format!("{name:?} cannot be given in a condition's \"include\": use a file"));
        } else if INCLUDES.contains(&name.as_str()) || treefile.decode_field(name, inner, problems) {
        } else if let Some(arch) = name.strip_prefix(ARCH_PACKAGES) {
            if scope.inline {
                problems.ignore_key(name, format!("{name:?} has no effect here, as in rpm-ostree: use a file"));
                continue;
            }
            let names = problems.at(name, |problems| Vec::<String>::decode(inner, problems));
            packages.extend(names.filter(|_| arch == scope.basearch).into_iter().flatten());
        } else if scope.format == Format::Yaml || scope.inline {
            note_unknown(name, problems);
        } else {
            treefile.extra.insert(name.clone(), inner.clone());
        }
    }
    if !scope.inline && imply(treefile) && value.get("boot_location").is_some_and(|given| !given.is_null()) {
        let message = "\"boot_location\" is the old name of \"boot-location\", which \"container\" or \"edition\" sets";
        problems.note_key("boot_location", message);
    }
    check(value, scope, treefile, problems);
    if !packages.is_empty() {
        treefile.packages.get_or_insert_default().extend(packages);
    }
    if !scope.inline {
        split_all(treefile, problems);
    }
}

/// Where the fields of `value` stand, which is itself at `path`.
fn places(value: &Value, path: &[Step]) -> Places {
    let key_of = |name| {
        let names = ALIASES.iter().filter(|(_, new)| *new == name).map(|(old, _)| *old).chain([name]);
        names.into_iter().find(|key| value.get(key).is_some_and(|inner| !inner.is_null()))
    };
    let place = |key: &str| [path, &[Step::Key(key.to_owned())]].concat();
    FIELDS.iter().filter_map(|field| Some((field.name, place(key_of(field.name)?)))).collect()
}

fn optional_names(value: &Value, problems: &mut Problems) -> BTreeSet<String> {
    if value.is_null() { BTreeSet::new() } else { BTreeSet::decode(value, problems).unwrap_or_default() }
}

fn note_unknown(name: &str, problems: &mut Problems) {
    let names = FIELDS.iter().map(|field| field.name).chain(INCLUDES);
    // Looking for near names takes long, and few mistakes are listed.
    let near = if problems.count() < HINTED { nearest(name, names) } else { None };
    let hint = match (name, near) {
        ("<<", _) => "; merge keys are not part of the language".to_owned(),
        (_, Some(near)) => format!(" (did you mean {near:?}?)"),
        (_, None) => String::new(),
    };
    problems.note_key(name, format!("unknown field {name:?}{hint}"));
}

/// Sets what other fields imply; this holds for the file they are in, before any include. `edition` has
/// defaults, `container` decides. Whether `boot-location` is among it.
fn imply(treefile: &mut Treefile) -> bool {
    let container = treefile.container == Some(true);
    let boots_from_modules = container || treefile.edition >= Some(Edition::Of2024);
    if boots_from_modules {
        let (boot_location, tmp_is_dir) = (&mut treefile.boot_location, &mut treefile.tmp_is_dir);
        if container {
            (*boot_location, *tmp_is_dir) = (None, None);
        }
        boot_location.get_or_insert(BootLocation::Modules);
        tmp_is_dir.get_or_insert(true);
    }
    if container {
        treefile.selinux = Some(false);
        treefile.preserve_passwd = Some(false);
        treefile.check_passwd = Some(CheckPasswd::None);
        treefile.check_groups = Some(CheckGroups::None);
    }
    boots_from_modules
}

/// What the types leave open.
fn check(value: &Value, scope: &Scope<'_>, treefile: &Treefile, problems: &mut Problems) {
    // Of a condition that does not hold it may be another one.
    if let Some(given) = treefile.basearch.as_ref().filter(|_| !scope.inline)
        && given != scope.basearch
    {
        problems.at("basearch", |problems| {
            problems.note(format!("this treefile is for {given}, and the compose is for {}", scope.basearch));
        });
    }
    for (index, (_, target)) in treefile.add_files.iter().flatten().enumerate() {
        if !may_add(target) {
            let message = format!("{target:?} is not below /usr (but /usr/local), /etc, /bin, /sbin, /lib or /lib64");
            problems.at("add-files", |p| p.inside(Step::Index(index), |p| p.note(message)));
        }
    }
    for (index, rule) in treefile.remove_from_packages.iter().flatten().enumerate() {
        if rule.is_empty() {
            let message = "expected a package's name and regular expressions, found an empty list";
            problems.at("remove-from-packages", |p| p.inside(Step::Index(index), |p| p.note(message)));
        }
    }
    if let Some(suffix) = &treefile.automatic_version_suffix
        && !(suffix.len() == 1 && suffix.is_ascii())
    {
        problems.at("automatic-version-suffix", |p| {
            p.unexpected(&value["automatic-version-suffix"], "one ASCII character");
        });
    }
    if treefile.selinux_label_version.is_some_and(|version| version > 1) {
        problems.at("selinux-label-version", |p| p.unexpected(&value["selinux-label-version"], "0 or 1"));
    }
    for (name, instead) in [("releasever", "it is the field \"releasever\""), ("basearch", "it is set by itself")] {
        if treefile.repovars.as_ref().is_some_and(|vars| vars.contains_key(name)) {
            problems.at("repovars", |p| p.note_key(name, format!("{name:?} cannot be set here: {instead}")));
        }
    }
}

/// Whether a file may be put there; the parts of a tree that a commit has.
fn may_add(target: &str) -> bool {
    let path = target.trim_start_matches('/');
    let below = |dir: &str| path.strip_prefix(dir).is_some_and(|rest| !rest.is_empty());
    let parts_fine = path.split('/').all(|part| part != "..");
    parts_fine
        && !path.starts_with("usr/local/")
        && ["usr/", "etc/", "bin/", "sbin/", "lib/", "lib64/"].into_iter().any(below)
}

/// Adds the variables that set themselves, and refuses them elsewhere.
fn settle_variables(treefile: &mut Treefile, basearch: &str, problems: &mut Problems) {
    let mut own = Variables::from([("basearch".to_owned(), Variable::Text(basearch.to_owned()))]);
    own.extend(treefile.releasever.as_ref().map(|version| ("releasever".to_owned(), version.into())));
    let variables = treefile.variables.get_or_insert_default();
    for (name, value) in &*variables {
        problems.at("variables", |problems| {
            if matches!(name.as_str(), "basearch" | "releasever") {
                problems.note_key(name, format!("{name:?} sets itself and cannot be set here"));
            }
            let text = value.to_string();
            if let Some(sign) = VARIABLE_SIGNS.into_iter().find(|&sign| name.contains(sign) || text.contains(sign)) {
                problems.note_key(name, format!("a variable's name and value cannot have {sign:?} in them"));
            }
        });
    }
    variables.extend(own);
}

fn split_all(treefile: &mut Treefile, problems: &mut Problems) {
    if let Some(packages) = &mut treefile.packages {
        problems.at("packages", |problems| split(packages, problems));
    }
    let of_repositories = treefile.repo_packages.iter_mut().flatten().map(|entry| &mut entry.packages).enumerate();
    let replacing = treefile.override_replace.iter_mut().flatten().map(|entry| &mut entry.packages).enumerate();
    let named = of_repositories.map(|entry| ("repo-packages", entry));
    for (field, (index, packages)) in named.chain(replacing.map(|entry| ("ex-override-replace", entry))) {
        problems.at(field, |problems| {
            problems.inside(Step::Index(index), |p| p.at("packages", |p| split(packages, p)));
        });
    }
}

/// Splits each text at its whitespace, but for what stands in single quotes.
fn split(packages: &mut BTreeSet<String>, problems: &mut Problems) {
    let mut names = BTreeSet::new();
    for text in &*packages {
        let parts: Vec<&str> = text.split('\'').collect();
        if parts.len().is_multiple_of(2) {
            problems.note(format!("a single quote is not closed in {text:?}"));
        }
        for (index, part) in parts.into_iter().enumerate() {
            match index % 2 {
                0 => names.extend(part.split_whitespace().map(str::to_owned)),
                _ => names.extend([part.to_owned()]),
            }
        }
    }
    *packages = names;
}

/// One file's name, or several.
struct Files(Vec<String>);

impl Decode for Files {
    fn decode(value: &Value, problems: &mut Problems) -> Option<Self> {
        match value {
            Value::String(file) => Some(Self(vec![file.clone()])),
            Value::Array(_) => Vec::decode(value, problems).map(Self),
            _ => {
                problems.unexpected(value, "a file's name or a list of them");
                None
            }
        }
    }
}

fn decode_includes(value: &Value, basearch: &str, parsed: &mut Parsed, problems: &mut Problems) {
    let present = |name: &str| value.get(name).filter(|inner| !inner.is_null());
    if let Some(inner) = present("include") {
        let files = problems.at("include", |problems| Files::decode(inner, problems));
        parsed.includes.extend(files.into_iter().flat_map(|files| files.0));
    }
    if let Some(inner) = present("arch-include") {
        let files = problems.at("arch-include", |problems| BTreeMap::<String, Files>::decode(inner, problems));
        let files = files.and_then(|mut files| files.remove(basearch));
        parsed.includes.extend(files.into_iter().flat_map(|files| files.0));
    }
    match present("conditional-include") {
        Some(Value::Array(items)) => {
            for (index, item) in items.iter().enumerate() {
                problems.at("conditional-include", |problems| {
                    problems.inside(Step::Index(index), |problems| {
                        parsed.conditional.extend(decode_conditional(item, index, basearch, problems));
                    });
                });
            }
        }
        Some(inner) => problems.at("conditional-include", |p| p.unexpected(inner, "a list of \"if\" and \"include\"")),
        None => {}
    }
}

fn decode_conditional(item: &Value, index: usize, basearch: &str, problems: &mut Problems) -> Option<Conditional> {
    let (Some(condition), Some(include)) = (item.get("if"), item.get("include")) else {
        problems.unexpected(item, "a mapping with \"if\" and \"include\"");
        return None;
    };
    let place = vec![Step::Key("conditional-include".to_owned()), Step::Index(index), Step::Key("if".to_owned())];
    let mut conditions = Vec::new();
    problems.at("if", |problems| {
        let mut read = |text: &Value, place: Vec<Step>, problems: &mut Problems| match text {
            Value::String(text) => match Condition::parse(text) {
                Ok(condition) => conditions.push((place, condition)),
                Err(message) => problems.note(message),
            },
            other => problems.unexpected(other, "a condition such as 'stream == \"stable\"'"),
        };
        match condition {
            Value::Array(texts) => {
                for (index, text) in texts.iter().enumerate() {
                    let place = [place.as_slice(), &[Step::Index(index)]].concat();
                    problems.inside(Step::Index(index), |problems| read(text, place, problems));
                }
            }
            text => read(text, place, problems),
        }
    });
    let included = problems.at("include", |problems| {
        if !include.is_object() {
            return Files::decode(include, problems).map(|files| Included::Files(files.0));
        }
        let mut treefile = Treefile::default();
        let scope = Scope { format: Format::Yaml, basearch, inline: true };
        decode_treefile(include, &scope, &mut treefile, problems);
        let path = [Step::Key("conditional-include".to_owned()), Step::Index(index), Step::Key("include".to_owned())];
        Some(Included::Inline(Box::new(treefile), places(include, &path)))
    })?;
    Some(Conditional { conditions, included })
}
