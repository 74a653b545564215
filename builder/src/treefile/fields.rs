//! The table of a treefile's fields: name, type, how an included file's value joins
//! the includer's, and what the dnf engine does with it. Everything else about
//! fields follows from it: decoding, merging, printing, the schema, refusals.

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::fmt;

use schemars::{Schema, SchemaGenerator};
use serde::Serialize;
use serde_json::{Map, Value};

use ByDnf::{Done, Layering, NoMeaning, Only};

use super::condition::Variable;
use super::decode::{Decode, Problems};
use super::types::{
    BootLocation, CheckGroups, CheckPasswd, CustomOrigin, Edition, Initramfs, MetadataTarget, OptUsrLocal,
    OverrideReplace, ReleaseVer, RepoPackages, Rojig, RpmdbBackend, Sysusers,
};

/// A row of the table, without its type.
pub struct Field {
    /// The name in a treefile.
    pub name: &'static str,
    /// What it means, and what holds where it is not given.
    pub meaning: &'static str,
    /// How an included file's value joins the includer's.
    pub merging: Merging,
    /// What the dnf engine does with it.
    pub by_dnf: ByDnf,
}

/// How values join.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[allow(non_camel_case_types, reason = "named as the functions that do it")]
pub enum Merging {
    /// [`first`]
    first,
    /// [`prepend`]
    prepend,
    /// [`union`]
    union,
    /// [`join`]
    join,
    /// [`own`]
    own,
}

impl fmt::Display for Merging {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::first => "the includer's, else the first include's",
            Self::prepend => "included lists come first, later includes before earlier",
            Self::union => "all",
            Self::join => "all keys; the includer's value",
            Self::own => "none: that of the first file counts",
        })
    }
}

/// What the dnf engine does with a field. The rpm-ostree engine carries out all.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ByDnf {
    /// Carries it out, or it has done its work when the treefile is loaded.
    Done,
    /// Nothing: it says nothing about the tree.
    NoMeaning,
    /// Refuses it, as rpm-ostree does in a compose: its client writes and reads it.
    Layering,
    /// Carries out these values only (of a list or mapping, the empty one) and
    /// refuses all others.
    Only(&'static [&'static str]),
}

impl fmt::Display for ByDnf {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Done => f.write_str("done"),
            Self::NoMeaning => f.write_str("no meaning at compose time"),
            Self::Layering => f.write_str("refused by both engines: it is for layering on a booted system"),
            Self::Only([]) => f.write_str("refused"),
            Self::Only(values) => {
                let quoted: Vec<_> = values.iter().map(|value| format!("`{value}`")).collect();
                write!(f, "{} only, else refused", quoted.join(", "))
            }
        }
    }
}

macro_rules! treefile {
    ($(#[doc = $meaning:literal] $name:literal $field:ident: $type:ty, $merge:ident, $by_dnf:expr;)+) => {
        /// A treefile's fields, in the order in which they are printed. None: not
        /// given; what holds then is in the field's description.
        #[derive(Debug, Clone, Default, PartialEq)]
        pub struct Treefile {
            $(#[doc = $meaning] pub $field: Option<$type>,)+
            /// Unknown fields of a JSON treefile, which are printed too.
            pub extra: Map<String, Value>,
        }

        /// All fields.
        pub const FIELDS: &[Field] = &[
            $(Field { name: $name, meaning: $meaning.trim_ascii(), merging: Merging::$merge, by_dnf: $by_dnf }),+
        ];

        /// The JSON schema of each field's type; null is always among it.
        pub fn schemas(generator: &mut SchemaGenerator) -> Vec<(&'static Field, Map<String, Value>)> {
            let schemas = [$(generator.subschema_for::<Option<$type>>()),+];
            let map = |schema: Schema| schema.as_object().cloned().unwrap_or_default();
            FIELDS.iter().zip(schemas.map(map)).collect()
        }

        impl Treefile {
            /// Decodes the field `name`; false if there is none.
            pub fn decode_field(&mut self, name: &str, value: &Value, problems: &mut Problems) -> bool {
                match name {
                    // Null is as good as not given.
                    $($name if value.is_null() => {}
                    $name => self.$field = problems.at(name, |problems| Decode::decode(value, problems)),)+
                    _ => return false,
                }
                true
            }

            /// Merges an included treefile into this one. `extra` stays the includer's.
            pub fn include(&mut self, included: Self) {
                $($merge(&mut self.$field, included.$field);)+
                drop_overridden(&mut self.repo_packages, |entry| &mut entry.packages);
                drop_overridden(&mut self.override_replace, |entry| &mut entry.packages);
            }

            /// The fields that are given, by name.
            pub fn given(&self) -> Map<String, Value> {
                let mut map = Map::new();
                $(if let Some(value) = &self.$field {
                    map.insert($name.to_owned(), json(value));
                })+
                map
            }
        }
    };
}

treefile! {
    /// Names, provides or queries such as `podman >= 4.1`. Always there after loading.
    "packages" packages: BTreeSet<String>, union, Done;
    /// Packages that come from one repository; of a package named twice the last counts.
    "repo-packages" repo_packages: Vec<RepoPackages>, prepend, Done;
    /// Whether wrappers replace rpm, dracut and the like; default false.
    "cliwrap" cliwrap: bool, first, Only(&["false"]);
    /// Which programs are wrapped; default all that are known.
    "cliwrap-binaries" cliwrap_binaries: Vec<String>, prepend, Only(&[]);
    /// On a booted system: the commit to derive from, by ref or checksum.
    "base-refspec" base_refspec: String, first, Layering;
    /// On a booted system: the container image to derive from.
    "container-image-reference" container_image_reference: String, first, Layering;
    /// On a booted system: packages from files, and the files' sha256.
    "packages-local" packages_local: BTreeMap<String, String>, join, Layering;
    /// On a booted system: the same, where files of other packages may be replaced.
    "packages-local-fileoverride" packages_local_fileoverride: BTreeMap<String, String>, join, Layering;
    /// On a booted system: packages of the base that are removed.
    "override-remove" override_remove: BTreeSet<String>, union, Layering;
    /// On a booted system: packages of the base that come from a repository instead.
    "ex-override-replace" override_replace: Vec<OverrideReplace>, prepend, Layering;
    /// On a booted system: packages of the base that come from files instead.
    "override-replace-local" override_replace_local: BTreeMap<String, String>, join, Layering;
    /// On a booted system: how the initramfs is made again.
    "initramfs" initramfs: Initramfs, first, Layering;
    /// On a booted system: where a custom origin is described.
    "custom" custom: CustomOrigin, first, Layering;
    /// On a booted system: the commit that is deployed instead of the ref's newest.
    "override-commit" override_commit: String, first, Layering;
    /// On a booted system: why it must be configured before it can be upgraded.
    "unconfigured-state" unconfigured_state: String, first, Layering;
    /// The set of defaults; default 2014.
    "edition" edition: Edition, first, Done;
    /// The branch that the commit goes to.
    "ref" treeref: String, first, Done;
    /// For other tools; not used in a compose.
    "metadata" metadata: BTreeMap<String, Value>, join, NoMeaning;
    /// The machine's architecture as RPM names it.
    "basearch" basearch: String, first, Done;
    /// Variables; they are gone after loading.
    "variables" variables: BTreeMap<String, Variable>, join, Done;
    /// Variables of .repo files, beside releasever and basearch.
    "repovars" repovars: BTreeMap<String, String>, join, Done;
    /// Name and description of the system.
    "rojig" rojig: Rojig, first, NoMeaning;
    /// Repositories by id, from .repo files beside the treefile; default the enabled ones.
    "repos" repos: Vec<String>, prepend, Done;
    /// Repositories for packages of a lockfile only; without one they are not read.
    "lockfile-repos" lockfile_repos: Vec<String>, prepend, Done;
    /// Whether files get SELinux labels; default true.
    "selinux" selinux: bool, first, Done;
    /// Whether device nodes are left out, not refused; default true.
    "ignore-devices" ignore_devices: bool, first, Done;
    /// 1: /usr/etc is labelled as /etc; default 0.
    "selinux-label-version" selinux_label_version: u32, first, Only(&["0"]);
    /// How users come from sysusers.d; default compose-auto.
    "sysusers" sysusers: Sysusers, first, Done;
    /// Whether IMA signatures of the packages go into the commit; default false.
    "ima" ima: bool, first, Only(&["false"]);
    /// The key that signs the commit; default none.
    "gpg-key" gpg_key: String, first, Only(&[]);
    /// Commits laid over the packages; a conflict is an error.
    "ostree-layers" ostree_layers: Vec<String>, prepend, Only(&[]);
    /// Commits laid over all else, replacing what is there.
    "ostree-override-layers" ostree_override_layers: Vec<String>, prepend, Only(&[]);
    /// Packages that must not come in, not even as a dependency.
    "exclude-packages" exclude_packages: Vec<String>, prepend, Done;
    /// The platform module, where it cannot be found out.
    "platform-module" platform_module: String, own, Only(&[]);
    /// Whether the tree is for a container, without kernel; default false.
    "container" container: bool, first, Done;
    /// Whether recommended packages are installed; default true.
    "recommends" recommends: bool, first, Done;
    /// Whether documentation is installed; default true.
    "documentation" documentation: bool, first, Done;
    /// Locales whose files are installed; default all.
    "install-langs" install_langs: Vec<String>, prepend, Done;
    /// Arguments of dracut; default `--no-hostonly`.
    "initramfs-args" initramfs_args: Vec<String>, prepend, Done;
    /// Whether no initramfs is made; default false.
    "no-initramfs" no_initramfs: bool, first, Done;
    /// Whether executables lose their write permission; default false.
    "readonly-executables" readonly_executables: bool, first, Done;
    /// Where the kernel goes; default new.
    "boot-location" boot_location: BootLocation, first, Done;
    /// Whether /tmp is a directory, not a link to sysroot/tmp; default false.
    "tmp-is-dir" tmp_is_dir: bool, first, Done;
    /// What /opt and /usr/local are; default var.
    "opt-usrlocal" opt_usrlocal: OptUsrLocal, first, Done;
    /// systemd units that are enabled.
    "units" units: Vec<String>, prepend, Done;
    /// systemd's default target.
    "default-target" default_target: String, first, Done;
    /// Whether there is an empty /etc/machine-id; default true.
    "machineid-compat" machineid_compat: bool, first, Done;
    /// `$releasever` of the .repo files.
    "releasever" releasever: ReleaseVer, first, Done;
    /// What the commit's version starts with.
    "automatic-version-prefix" automatic_version_prefix: String, first, Done;
    /// One character between prefix and number; default a dot.
    "automatic-version-suffix" automatic_version_suffix: String, first, Done;
    /// The version in os-release that the commit's version replaces.
    "mutate-os-release" mutate_os_release: String, first, Done;
    /// Groups that go to /etc/group.
    "etc-group-members" etc_group_members: Vec<String>, prepend, Done;
    /// Whether the previous commit's accounts are kept; default true.
    "preserve-passwd" preserve_passwd: bool, first, Done;
    /// What the users are held against; default previous.
    "check-passwd" check_passwd: CheckPasswd, first, Done;
    /// What the groups are held against; default previous.
    "check-groups" check_groups: CheckGroups, first, Done;
    /// Users that may be gone, `*` for any.
    "ignore-removed-users" ignore_removed_users: BTreeSet<String>, union, Done;
    /// Groups that may be gone, `*` for any.
    "ignore-removed-groups" ignore_removed_groups: BTreeSet<String>, union, Done;
    /// A script beside the treefile, run in the tree after the others.
    "postprocess-script" postprocess_script: String, first, Done;
    /// Scripts run in the tree.
    "postprocess" postprocess: Vec<String>, prepend, Done;
    /// Files beside the treefile, and where in the tree they go.
    "add-files" add_files: Vec<(String, String)>, prepend, Done;
    /// Paths that are removed from the tree.
    "remove-files" remove_files: Vec<String>, prepend, Done;
    /// A package, and regular expressions for those of its files that are removed.
    "remove-from-packages" remove_from_packages: Vec<Vec<String>>, prepend, Done;
    /// Metadata of the commit.
    "add-commit-metadata" add_commit_metadata: BTreeMap<String, Value>, join, Done;
    /// Where metadata of the repositories goes; default inline, with dnf disabled.
    "repo-metadata" repo_metadata: MetadataTarget, first, Only(&["disabled"]);
    /// Where metadata of the advisories goes; default inline, with dnf disabled.
    "advisories-metadata" advisories_metadata: MetadataTarget, first, Only(&["disabled"]);
    /// The format of the RPM database; default target.
    "rpmdb" rpmdb: RpmdbBackend, first, Done;
    /// Whether the RPM database is made reproducible; default false.
    "rpmdb-normalize" rpmdb_normalize: bool, first, Done;
    /// The command of a container made of the tree.
    "container-cmd" container_cmd: Vec<String>, first, Done;
}

/// A field as JSON. The types' own code writes it, and all their keys are strings,
/// which is all that serde_json asks for.
fn json(value: &impl Serialize) -> Value {
    serde_json::to_value(value).expect("fields have string keys only")
}

/// The includer's value, else the included one's, the first include's before later ones'.
fn first<T>(includer: &mut Option<T>, included: Option<T>) {
    *includer = includer.take().or(included);
}

/// The included list comes before all that is there: later includes come first.
fn prepend<T>(includer: &mut Option<Vec<T>>, included: Option<Vec<T>>) {
    if let Some(mut list) = included {
        list.extend(includer.take().unwrap_or_default());
        *includer = Some(list);
    }
}

/// All of both.
fn union(includer: &mut Option<BTreeSet<String>>, included: Option<BTreeSet<String>>) {
    if let Some(set) = included {
        includer.get_or_insert_default().extend(set);
    }
}

/// All keys of both; of a key in both, the includer's.
pub fn join<T>(includer: &mut Option<BTreeMap<String, T>>, included: Option<BTreeMap<String, T>>) {
    if let Some(map) = included {
        let own = includer.get_or_insert_default();
        for (key, value) in map {
            own.entry(key).or_insert(value);
        }
    }
}

/// The first file's only: rpm-ostree forgets it of included ones.
fn own<T>(_includer: &mut Option<T>, _included: Option<T>) {}

/// Keeps of a package that several entries name the last mention.
fn drop_overridden<T>(entries: &mut Option<Vec<T>>, packages: fn(&mut T) -> &mut BTreeSet<String>) {
    let Some(list) = entries else { return };
    let mut seen = HashSet::new();
    for entry in list.iter_mut().rev() {
        packages(entry).retain(|package| seen.insert(package.clone()));
    }
    list.retain_mut(|entry| !packages(entry).is_empty());
}

impl Treefile {
    /// The treefile as one JSON object, in the order of the fields and as rpm-ostree
    /// prints it: without what has done its work when the treefile is loaded.
    pub fn to_json(&self) -> Value {
        let mut map = self.given();
        for consumed in ["variables", "repovars"] {
            map.shift_remove(consumed);
        }
        map.extend(self.extra.clone());
        Value::Object(map)
    }

    /// The fields that are given with a value that the dnf engine does not carry out.
    pub fn refused_by_dnf(&self) -> Vec<&'static Field> {
        let given = self.given();
        let refused = |field: &&Field| match field.by_dnf {
            Done | NoMeaning => false,
            Layering => given.contains_key(field.name),
            Only(values) => match given.get(field.name) {
                None => false,
                Some(Value::Array(items)) => !items.is_empty(),
                Some(Value::String(text)) => !values.contains(&text.as_str()),
                Some(value) => !values.contains(&value.to_string().as_str()),
            },
        };
        FIELDS.iter().filter(refused).collect()
    }
}
