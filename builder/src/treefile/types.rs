//! The types of a treefile's fields that are more than strings, lists and maps.

use std::borrow::Cow;
use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::{Serialize, Serializer};
use serde_json::{Value, json};

use super::decode::{Decode, Problems, nearest, optional, required};

/// An enumeration of names, and what a treefile may write for each.
macro_rules! choice {
    ($(#[doc = $about:literal])+ $type:ident {
        $($(#[doc = $meaning:literal])+ $variant:ident = $name:literal $(| $alias:literal)*),+ $(,)?
    }) => {
        $(#[doc = $about])+
        #[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
        pub enum $type { $($(#[doc = $meaning])+ $variant),+ }

        impl $type {
            /// The name in a treefile.
            pub fn name(self) -> &'static str {
                match self { $(Self::$variant => $name),+ }
            }
        }

        impl Decode for $type {
            fn decode(value: &Value, problems: &mut Problems) -> Option<Self> {
                match value.as_str() {
                    $(Some($name $(| $alias)*) => return Some(Self::$variant),)+
                    given => expected_one_of(value, given, &[$($name),+], problems),
                }
                None
            }
        }

        impl JsonSchema for $type {
            fn schema_name() -> Cow<'static, str> {
                stringify!($type).into()
            }

            fn json_schema(_generator: &mut SchemaGenerator) -> Schema {
                let about = concat!($($about),+).trim();
                let mut values = Vec::new();
                $(
                    let meaning = concat!($($meaning),+).trim();
                    values.push(json!({"const": $name, "description": meaning}));
                    $(values.push(json!({"const": $alias, "description": concat!("As `", $name, "`.")}));)*
                )+
                json_schema!({"description": about, "type": "string", "oneOf": values})
            }
        }

        impl Serialize for $type {
            fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                serializer.serialize_str(self.name())
            }
        }
    };
}

fn expected_one_of(value: &Value, given: Option<&str>, names: &[&str], problems: &mut Problems) {
    let quoted: Vec<_> = names.iter().map(|name| format!("{name:?}")).collect();
    let hint = given.and_then(|given| nearest(given, names.iter().copied()));
    let hint = hint.map(|near| format!(" (did you mean {near:?}?)")).unwrap_or_default();
    problems.unexpected(value, &format!("one of {}{hint}", quoted.join(", ")));
}

/// How a mapping is read into a struct: the fields that it must have, then those that it may.
macro_rules! mapping {
    ($type:ident, $expected:literal, [$($must:ident),+], [$($may:ident),*]) => {
        impl Decode for $type {
            fn decode(value: &Value, problems: &mut Problems) -> Option<Self> {
                if !value.is_object() {
                    problems.unexpected(value, $expected);
                    return None;
                }
                $(let $must = required(value, stringify!($must), problems);)+
                $(let $may = optional(value, stringify!($may), problems);)*
                Some(Self { $($must: $must?,)+ $($may),* })
            }
        }
    };
}

choice! {
    /// The set of defaults.
    Edition {
        /// The first, which holds where none is given.
        Of2014 = "2014",
        /// `boot-location: modules` and `tmp-is-dir: true`.
        Of2024 = "2024",
    }
}

choice! {
    /// Where the kernel goes.
    BootLocation {
        /// `/usr/lib/ostree-boot` and `/usr/lib/modules`; the default.
        New = "new",
        /// `/usr/lib/modules` only.
        Modules = "modules",
        /// As `Modules`, and laid out by kernel-install.
        KernelInstall = "kernel-install",
    }
}

choice! {
    /// What `/opt` and `/usr/local` are.
    OptUsrLocal {
        /// Links into `/var`; the default.
        Var = "var",
        /// Directories of the tree.
        Root = "root",
        /// Directories with a writable overlay.
        StateOverlay = "state-overlay" | "stateoverlay",
    }
}

choice! {
    /// The format of the RPM database: of the target, in all but `Host`.
    RpmdbBackend {
        /// Old name of `Target`.
        Bdb = "bdb" | "b-d-b",
        /// Old name of `Target`.
        Sqlite = "sqlite",
        /// Old name of `Target`.
        Ndb = "ndb",
        /// What the rpm in the tree uses; the default.
        Target = "target",
        /// What the rpm of the machine that composes uses.
        Host = "host",
    }
}

choice! {
    /// Where metadata about the repositories or advisories goes.
    MetadataTarget {
        /// Into the commit; the default.
        Inline = "inline",
        /// Into the commit's detached metadata.
        Detached = "detached",
        /// Nowhere.
        Disabled = "disabled",
    }
}

choice! {
    /// How users and groups come from sysusers.d.
    Sysusers {
        /// Made at compose time, into the passwd files, whatever the packages do.
        ComposeForced = "compose-forced",
        /// As the packages have it, whose scriptlets make them at compose time; the default.
        ComposeAuto = "compose-auto",
    }
}

/// A number or a string, such as a release version.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, JsonSchema)]
#[serde(untagged)]
pub enum ReleaseVer {
    /// `41`
    Number(u64),
    /// `"41"`
    Text(String),
}

impl fmt::Display for ReleaseVer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Number(number) => number.fmt(f),
            Self::Text(text) => text.fmt(f),
        }
    }
}

impl Decode for ReleaseVer {
    fn decode(value: &Value, problems: &mut Problems) -> Option<Self> {
        match value {
            Value::String(text) => Some(Self::Text(text.clone())),
            value if value.is_u64() => value.as_u64().map(Self::Number),
            value => {
                problems.unexpected(value, "a whole number or a string (quote it)");
                None
            }
        }
    }
}

/// What to hold the new passwd file against.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, JsonSchema)]
#[serde(tag = "type", rename_all = "kebab-case")]
pub enum CheckPasswd {
    /// Nothing.
    None,
    /// The previous commit's; the default.
    Previous,
    /// A file beside the treefile.
    File {
        /// Its name, from the treefile's directory.
        filename: String,
    },
    /// These.
    Data {
        /// By user name.
        entries: BTreeMap<String, UserIds>,
    },
}

/// What to hold the new group file against.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, JsonSchema)]
#[serde(tag = "type", rename_all = "kebab-case")]
pub enum CheckGroups {
    /// Nothing.
    None,
    /// The previous commit's; the default.
    Previous,
    /// A file beside the treefile.
    File {
        /// Its name, from the treefile's directory.
        filename: String,
    },
    /// These.
    Data {
        /// Group ids by name.
        entries: BTreeMap<String, u32>,
    },
}

/// A user's ids as written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, JsonSchema)]
#[serde(untagged)]
pub enum UserIds {
    /// `3`: user and group.
    Same(u32),
    /// `[3]`: user and group.
    SameInList([u32; 1]),
    /// `[3, 4]`: user, group.
    UserAndGroup([u32; 2]),
}

impl Decode for UserIds {
    fn decode(value: &Value, problems: &mut Problems) -> Option<Self> {
        if !value.is_array() {
            return u32::decode(value, problems).map(Self::Same);
        }
        match Vec::<u32>::decode(value, problems)?.as_slice() {
            [id] => Some(Self::SameInList([*id])),
            [user, group] => Some(Self::UserAndGroup([*user, *group])),
            _ => {
                problems.unexpected(value, "an id, or a list of a user's and a group's id");
                None
            }
        }
    }
}

/// The kinds of check, before it is known whose.
enum Check<T> {
    None,
    Previous,
    File(String),
    Data(BTreeMap<String, T>),
}

impl<T: Decode> Decode for Check<T> {
    fn decode(value: &Value, problems: &mut Problems) -> Option<Self> {
        if !value.is_object() {
            problems.unexpected(value, "a mapping with \"type\"");
            return None;
        }
        match required::<String>(value, "type", problems)?.as_str() {
            "none" => Some(Self::None),
            "previous" => Some(Self::Previous),
            "file" => required(value, "filename", problems).map(Self::File),
            "data" => required(value, "entries", problems).map(Self::Data),
            given => {
                let names = ["none", "previous", "file", "data"];
                problems.at("type", |problems| expected_one_of(&value["type"], Some(given), &names, problems));
                None
            }
        }
    }
}

impl Decode for CheckPasswd {
    fn decode(value: &Value, problems: &mut Problems) -> Option<Self> {
        Some(match Check::decode(value, problems)? {
            Check::None => Self::None,
            Check::Previous => Self::Previous,
            Check::File(filename) => Self::File { filename },
            Check::Data(entries) => Self::Data { entries },
        })
    }
}

impl Decode for CheckGroups {
    fn decode(value: &Value, problems: &mut Problems) -> Option<Self> {
        Some(match Check::decode(value, problems)? {
            Check::None => Self::None,
            Check::Previous => Self::Previous,
            Check::File(filename) => Self::File { filename },
            Check::Data(entries) => Self::Data { entries },
        })
    }
}

/// What a treefile says of the rojig package; today only its name is of use.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, JsonSchema)]
pub struct Rojig {
    /// The system's name.
    pub name: String,
    /// One line about it.
    pub summary: String,
    /// Its licence.
    pub license: String,
    /// More about it.
    pub description: Option<String>,
}

mapping!(Rojig, "a mapping with \"name\", \"summary\" and \"license\"", [name, summary, license], [description]);

/// Packages that come from one repository and no other.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, JsonSchema)]
pub struct RepoPackages {
    /// The repository's name.
    pub repo: String,
    /// Names or provides.
    pub packages: BTreeSet<String>,
}

mapping!(RepoPackages, "a mapping with \"repo\" and \"packages\"", [repo, packages], []);

/// Packages of the base that are replaced.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, JsonSchema)]
pub struct OverrideReplace {
    /// Where the others come from.
    pub from: OverrideSource,
    /// Names or provides.
    pub packages: BTreeSet<String>,
}

/// Where packages come from that replace those of the base.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, JsonSchema)]
pub struct OverrideSource {
    /// The repository's name.
    pub repo: String,
}

mapping!(OverrideReplace, "a mapping with \"from\" and \"packages\"", [from, packages], []);

impl Decode for OverrideSource {
    fn decode(value: &Value, problems: &mut Problems) -> Option<Self> {
        if value.as_object().is_none_or(|source| source.len() != 1) {
            problems.unexpected(value, "a mapping with \"repo\" and nothing else");
            return None;
        }
        required(value, "repo", problems).map(|repo| Self { repo })
    }
}

/// How the initramfs of a booted system is made again.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, JsonSchema)]
pub struct Initramfs {
    /// Whether it is.
    pub regenerate: bool,
    /// Files of /etc that go into it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub etc: Option<BTreeSet<String>>,
    /// Arguments of dracut.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub args: Option<Vec<String>>,
}

mapping!(Initramfs, "a mapping with \"regenerate\"", [regenerate], [etc, args]);

/// Where a custom origin is described.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, JsonSchema)]
pub struct CustomOrigin {
    /// Its address.
    pub url: String,
    /// A line about it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub description: Option<String>,
}

mapping!(CustomOrigin, "a mapping with \"url\"", [url], [description]);
