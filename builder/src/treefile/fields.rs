//! The table of a treefile's fields: name, type, and how an included file's value
//! joins the includer's. Everything else about fields follows from it.

use std::collections::{BTreeMap, BTreeSet, HashSet};

use serde::Serialize;
use serde_json::{Map, Value};

use super::condition::Variable;
use super::decode::{Decode, Problems};
use super::types::{
    BootLocation, CheckGroups, CheckPasswd, Edition, MetadataTarget, OptUsrLocal, ReleaseVer, RepoPackages, Rojig,
    RpmdbBackend, Sysusers,
};

macro_rules! treefile {
    ($($(#[$meta:meta])* $name:literal $field:ident: $type:ty, $merge:ident;)+) => {
        /// A treefile's fields, in the order in which they are printed. None: not
        /// given; what holds then is in the field's description.
        #[derive(Debug, Clone, Default, PartialEq)]
        pub struct Treefile {
            $($(#[$meta])* pub $field: Option<$type>,)+
            /// Unknown fields of a JSON treefile, which are printed too.
            pub extra: Map<String, Value>,
        }

        /// The names of all fields.
        pub const FIELDS: &[&str] = &[$($name),+];

        impl Treefile {
            /// Decodes the field `name`; false if there is none.
            pub fn decode_field(&mut self, name: &str, value: &Value, problems: &mut Problems) -> bool {
                match name {
                    $($name => self.$field = problems.at(name, |problems| field(value, problems)),)+
                    _ => return false,
                }
                true
            }

            /// Merges an included treefile into this one. `extra` stays the includer's.
            pub fn include(&mut self, included: Self) {
                $($merge(&mut self.$field, included.$field);)+
                drop_overridden(&mut self.repo_packages);
            }

            /// The fields that are given, by name.
            fn given(&self) -> Map<String, Value> {
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
    "packages" packages: BTreeSet<String>, union;
    /// Packages that come from one repository; of a package named twice the last counts.
    "repo-packages" repo_packages: Vec<RepoPackages>, prepend;
    /// Whether wrappers replace rpm, dracut and the like; default false.
    "cliwrap" cliwrap: bool, first;
    /// Which programs are wrapped; default all that are known.
    "cliwrap-binaries" cliwrap_binaries: Vec<String>, prepend;
    /// The set of defaults; default 2014.
    "edition" edition: Edition, first;
    /// The branch that the commit goes to.
    "ref" treeref: String, first;
    /// For other tools; not used in a compose.
    "metadata" metadata: BTreeMap<String, Value>, join;
    /// The machine's architecture as RPM names it.
    "basearch" basearch: String, first;
    /// Variables; they are gone after loading.
    "variables" variables: BTreeMap<String, Variable>, join;
    /// Variables of .repo files, beside releasever and basearch.
    "repovars" repovars: BTreeMap<String, String>, join;
    /// Name and description of the system.
    "rojig" rojig: Rojig, first;
    /// Repositories by id, from .repo files beside the treefile; default the enabled ones.
    "repos" repos: Vec<String>, prepend;
    /// Repositories for packages of a lockfile only.
    "lockfile-repos" lockfile_repos: Vec<String>, prepend;
    /// Whether files get SELinux labels; default true.
    "selinux" selinux: bool, first;
    /// Whether device nodes are left out, not refused; default true.
    "ignore-devices" ignore_devices: bool, first;
    /// 1: /usr/etc is labelled as /etc; default 0.
    "selinux-label-version" selinux_label_version: u32, first;
    /// How users come from sysusers.d; default compose-forced.
    "sysusers" sysusers: Sysusers, first;
    /// Whether IMA signatures of the packages go into the commit; default false.
    "ima" ima: bool, first;
    /// The key that signs the commit; default none.
    "gpg-key" gpg_key: String, first;
    /// Commits laid over the packages; a conflict is an error.
    "ostree-layers" ostree_layers: Vec<String>, prepend;
    /// Commits laid over all else, replacing what is there.
    "ostree-override-layers" ostree_override_layers: Vec<String>, prepend;
    /// Packages that must not come in, not even as a dependency.
    "exclude-packages" exclude_packages: Vec<String>, prepend;
    /// The platform module, where it cannot be found out.
    "platform-module" platform_module: String, first;
    /// Whether the tree is for a container, without kernel; default false.
    "container" container: bool, first;
    /// Whether recommended packages are installed; default true.
    "recommends" recommends: bool, first;
    /// Whether documentation is installed; default true.
    "documentation" documentation: bool, first;
    /// Locales whose files are installed; default all.
    "install-langs" install_langs: Vec<String>, prepend;
    /// Arguments of dracut; default `--no-hostonly`.
    "initramfs-args" initramfs_args: Vec<String>, prepend;
    /// Whether no initramfs is made; default false.
    "no-initramfs" no_initramfs: bool, first;
    /// Whether executables lose their write permission; default false.
    "readonly-executables" readonly_executables: bool, first;
    /// Where the kernel goes; default new.
    "boot-location" boot_location: BootLocation, first;
    /// Whether /tmp is a directory, not a link to sysroot/tmp; default false.
    "tmp-is-dir" tmp_is_dir: bool, first;
    /// What /opt and /usr/local are; default var.
    "opt-usrlocal" opt_usrlocal: OptUsrLocal, first;
    /// systemd units that are enabled.
    "units" units: Vec<String>, prepend;
    /// systemd's default target.
    "default-target" default_target: String, first;
    /// Whether there is an empty /etc/machine-id; default true.
    "machineid-compat" machineid_compat: bool, first;
    /// `$releasever` of the .repo files.
    "releasever" releasever: ReleaseVer, first;
    /// What the commit's version starts with.
    "automatic-version-prefix" automatic_version_prefix: String, first;
    /// One character between prefix and number; default a dot.
    "automatic-version-suffix" automatic_version_suffix: String, first;
    /// The version in os-release that the commit's version replaces.
    "mutate-os-release" mutate_os_release: String, first;
    /// Groups that go to /etc/group.
    "etc-group-members" etc_group_members: Vec<String>, prepend;
    /// Whether the previous commit's accounts are kept; default true.
    "preserve-passwd" preserve_passwd: bool, first;
    /// What the users are held against; default previous.
    "check-passwd" check_passwd: CheckPasswd, first;
    /// What the groups are held against; default previous.
    "check-groups" check_groups: CheckGroups, first;
    /// Users that may be gone, `*` for any.
    "ignore-removed-users" ignore_removed_users: BTreeSet<String>, union;
    /// Groups that may be gone, `*` for any.
    "ignore-removed-groups" ignore_removed_groups: BTreeSet<String>, union;
    /// A script beside the treefile, run in the tree after the others.
    "postprocess-script" postprocess_script: String, first;
    /// Scripts run in the tree.
    "postprocess" postprocess: Vec<String>, prepend;
    /// Files beside the treefile, and where in the tree they go.
    "add-files" add_files: Vec<(String, String)>, prepend;
    /// Paths that are removed from the tree.
    "remove-files" remove_files: Vec<String>, prepend;
    /// A package, and regular expressions for those of its files that are removed.
    "remove-from-packages" remove_from_packages: Vec<Vec<String>>, prepend;
    /// Metadata of the commit.
    "add-commit-metadata" add_commit_metadata: BTreeMap<String, Value>, join;
    /// Where metadata of the repositories goes; default inline.
    "repo-metadata" repo_metadata: MetadataTarget, first;
    /// Where metadata of the advisories goes; default inline.
    "advisories-metadata" advisories_metadata: MetadataTarget, first;
    /// The format of the RPM database; default target.
    "rpmdb" rpmdb: RpmdbBackend, first;
    /// Whether the RPM database is made reproducible; default false.
    "rpmdb-normalize" rpmdb_normalize: bool, first;
    /// The command of a container made of the tree.
    "container-cmd" container_cmd: Vec<String>, first;
}

/// A field as JSON. The types' own code writes it, and all their keys are strings,
/// which is all that serde_json asks for.
fn json(value: &impl Serialize) -> Value {
    serde_json::to_value(value).expect("fields have string keys only")
}

/// Null is as good as not given.
fn field<T: Decode>(value: &Value, problems: &mut Problems) -> Option<T> {
    if value.is_null() { None } else { T::decode(value, problems) }
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

/// Keeps of a package that is named for several repositories the last mention.
fn drop_overridden(repo_packages: &mut Option<Vec<RepoPackages>>) {
    let Some(list) = repo_packages else { return };
    let mut seen = HashSet::new();
    for entry in list.iter_mut().rev() {
        entry.packages.retain(|package| seen.insert(package.clone()));
    }
    list.retain(|entry| !entry.packages.is_empty());
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
}
