//! A treefile's text, turned into plain values: YAML or JSON, bounded in what an
//! alias may expand to, and with the line and column of everything that is wrong.

use std::cell::{Cell, RefCell};
use std::collections::BTreeSet;
use std::fmt;

use serde::de::{DeserializeSeed, Error, IgnoredAny, MapAccess, SeqAccess, Visitor};
use serde::{Deserialize, Deserializer, Serialize};
use serde_json::{Map, Number, Value, json};

/// Bytes that a treefile's values may take, 16 for each beside its text. The
/// largest public treefile has some 60 KiB; aliases of aliases reach any size.
const EXPANDED_LIMIT: usize = 8 << 20;

/// Depth of lists and mappings in each other that is let through to the parser,
/// whose time grows with the square of it. `serde_yaml`'s own limit is 128.
const NESTING_LIMIT: usize = 256;

/// How a treefile is written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Format {
    /// By the name's end `.yaml` or `.yml`. Unknown fields are errors.
    Yaml,
    /// Any other name. Unknown fields are kept: that is how old ones hold comments.
    Json,
}

/// A step from a value to one inside it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Step {
    /// The value of a mapping's key.
    Key(String),
    /// An item of a list, from 0.
    Index(usize),
}

/// What is wrong, and where.
#[derive(Debug)]
pub struct Problem {
    /// The value concerned, from the top of the file.
    pub path: Vec<Step>,
    /// Whether the last step's key itself is meant, not its value.
    pub at_key: bool,
    /// What is wrong, for people.
    pub message: String,
}

/// A text, read.
#[derive(Debug)]
pub struct Source {
    /// What stands in it.
    pub value: Value,
    /// Keys that are given twice where that is no mistake: the last counts.
    pub repeated: BTreeSet<String>,
}

/// What is wrong with a text as such: then there is no value to look at.
#[derive(Debug)]
pub struct SyntaxError {
    /// Line and column, from 1, where known.
    pub place: Option<(usize, usize)>,
    /// What is wrong, for people.
    pub message: String,
}

impl SyntaxError {
    /// The parsers repeat the place in their message.
    fn new(place: Option<(usize, usize)>, error: &dyn fmt::Display) -> Self {
        let repeated = place.map(|(line, column)| format!(" at line {line} column {column}")).unwrap_or_default();
        let message = error.to_string();
        Self { place, message: message.replacen(&repeated, "", 1) }
    }
}

/// What the keys of a mapping are, for whether one may be given twice. In rpm-ostree
/// what becomes a field may not; elsewhere the last counts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Keys {
    /// Those of a treefile, or of what is below it in a condition.
    Fields,
    /// Those of a field, such as `rojig`.
    Parts,
    /// Those of an item of `conditional-include`.
    Conditional,
    /// Anything, at any depth.
    Free,
}

/// Parses `text`. An empty YAML text is null. `below` says of a key and of the mapping it
/// is in what the keys below it are, and whether it may be given twice.
///
/// # Errors
/// Bad syntax, a key given twice, too deep nesting, aliases that expand to too much.
pub fn parse(text: &str, format: Format, below: fn(Keys, &str) -> (Keys, bool)) -> Result<Source, SyntaxError> {
    if nesting(text) > NESTING_LIMIT {
        return Err(SyntaxError { place: None, message: format!("brackets nest deeper than {NESTING_LIMIT}") });
    }
    let budget = Cell::new(EXPANDED_LIMIT);
    let repeated = RefCell::default();
    let seed = ValueSeed { budget: &budget, repeated: &repeated, below, keys: Keys::Fields, top: true };
    let value = match format {
        Format::Yaml => match seed.deserialize(serde_yaml::Deserializer::from_str(text)) {
            Ok(mut value) => {
                take_as_written(&mut value, text);
                value
            }
            Err(error) => match error.location() {
                None if text.lines().all(|line| line.trim_start().starts_with('#') || line.trim().is_empty()) => {
                    Value::Null
                }
                place => return Err(SyntaxError::new(place.map(|p| (p.line(), p.column())), &error)),
            },
        },
        Format::Json => {
            let mut reader = serde_json::Deserializer::from_str(text);
            seed.deserialize(&mut reader)
                .and_then(|value| reader.end().map(|()| value))
                .map_err(|error| SyntaxError::new(Some((error.line(), error.column())), &error))?
        }
    };
    Ok(Source { value, repeated: repeated.into_inner() })
}

/// The parts of a treefile in YAML whose scalars rpm-ostree takes as they are written,
/// whatever they look like: `- 1.10` is the name 1.10, and an item of nothing is empty.
#[derive(Debug, Deserialize, Serialize)]
#[serde(rename_all = "kebab-case")]
struct AsWritten {
    #[serde(skip_serializing_if = "Option::is_none")]
    packages: Option<Vec<String>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    repo_packages: Option<Vec<RepoPackagesAsWritten>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    cliwrap_binaries: Option<Vec<String>>,
}

#[derive(Debug, Deserialize, Serialize)]
struct RepoPackagesAsWritten {
    repo: String,
    packages: Vec<String>,
}

/// Replaces in `value`, which is that of `text`, what was read as something else than
/// the text that stands there.
fn take_as_written(value: &mut Value, text: &str) {
    const FIELDS: [&str; 3] = ["packages", "repo-packages", "cliwrap-binaries"];
    let Some(fields) = value.as_object_mut() else { return };
    // All are looked at. A field of nothing is not given.
    let given = fields.iter_mut().filter(|(name, value)| FIELDS.contains(&name.as_str()) && !value.is_null());
    if given.fold(false, |others, (_, value)| into_strings(value) | others)
        && let Ok(written) = AsWritten::deserialize(serde_yaml::Deserializer::from_str(text))
        && let Value::Object(written) = json!(written)
    {
        fields.extend(written);
    }
}

/// Makes strings of numbers and booleans in `value`, nearly as they are written: that is enough
/// beside a mistake, which is then the one to tell. Whether there are any, or nulls.
fn into_strings(value: &mut Value) -> bool {
    match value {
        Value::Array(items) => items.iter_mut().fold(false, |others, item| into_strings(item) | others),
        Value::Object(entries) => entries.values_mut().fold(false, |others, item| into_strings(item) | others),
        Value::String(_) => false,
        Value::Null => true,
        scalar => {
            *scalar = scalar.to_string().into();
            true
        }
    }
}

/// The line and column, from 1, of the value at `path`, or of its key.
pub fn locate(text: &str, path: &[Step], at_key: bool) -> Option<(usize, usize)> {
    // JSON is as good as YAML here, whose parser knows where a value starts.
    let probe = Probe { path, at_key };
    let error = probe.deserialize(serde_yaml::Deserializer::from_str(text)).err()?;
    error.location().map(|place| (place.line(), place.column()))
}

/// The greatest count of brackets that are open at once, wherever they stand: in
/// scalars they come in pairs too, nearly always.
fn nesting(text: &str) -> usize {
    let mut open = 0_usize;
    let mut most = 0;
    for byte in text.bytes() {
        match byte {
            b'[' | b'{' => open += 1,
            b']' | b'}' => open = open.saturating_sub(1),
            _ => {}
        }
        most = most.max(open);
    }
    most
}

/// Builds a value and counts what it takes.
#[derive(Clone, Copy)]
struct ValueSeed<'a> {
    budget: &'a Cell<usize>,
    repeated: &'a RefCell<BTreeSet<String>>,
    below: fn(Keys, &str) -> (Keys, bool),
    /// Of the mappings in the value.
    keys: Keys,
    /// Whether the value is the whole text.
    top: bool,
}

impl ValueSeed<'_> {
    fn spend<E: Error>(self, text: usize) -> Result<(), E> {
        let left = self.budget.get().checked_sub(text + 16);
        self.budget.set(left.ok_or_else(|| E::custom(format!("aliases expand to over {EXPANDED_LIMIT} bytes")))?);
        Ok(())
    }
}

impl<'de> DeserializeSeed<'de> for ValueSeed<'_> {
    type Value = Value;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Value, D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for ValueSeed<'_> {
    type Value = Value;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a string, number, boolean, list or mapping without a tag")
    }

    fn visit_bool<E: Error>(self, value: bool) -> Result<Value, E> {
        self.spend(0).map(|()| Value::Bool(value))
    }

    fn visit_i64<E: Error>(self, value: i64) -> Result<Value, E> {
        self.spend(0).map(|()| value.into())
    }

    fn visit_u64<E: Error>(self, value: u64) -> Result<Value, E> {
        self.spend(0).map(|()| value.into())
    }

    fn visit_f64<E: Error>(self, value: f64) -> Result<Value, E> {
        self.spend(0).map(|()| Number::from_f64(value).map_or(Value::Null, Value::Number))
    }

    fn visit_str<E: Error>(self, value: &str) -> Result<Value, E> {
        self.spend(value.len()).map(|()| value.into())
    }

    fn visit_unit<E: Error>(self) -> Result<Value, E> {
        self.spend(0).map(|()| Value::Null)
    }

    fn visit_none<E: Error>(self) -> Result<Value, E> {
        self.visit_unit()
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut access: A) -> Result<Value, A::Error> {
        self.spend(0)?;
        let mut list = Vec::new();
        while let Some(item) = access.next_element_seed(ValueSeed { top: false, ..self })? {
            list.push(item);
        }
        Ok(Value::Array(list))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut access: A) -> Result<Value, A::Error> {
        self.spend(0)?;
        let mut map = Map::new();
        while let Some(key) = access.next_key_seed(KeySeed { taken: &map, within: self })? {
            self.spend(key.len())?;
            let (keys, _) = (self.below)(self.keys, &key);
            let value = access.next_value_seed(ValueSeed { keys, top: false, ..self })?;
            map.insert(key, value);
        }
        Ok(Value::Object(map))
    }
}

/// Reads a key that is not yet in `taken`, unless it may be given twice.
struct KeySeed<'a> {
    taken: &'a Map<String, Value>,
    within: ValueSeed<'a>,
}

impl<'de> DeserializeSeed<'de> for KeySeed<'_> {
    type Value = String;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<String, D::Error> {
        // As in rpm-ostree, a field may be named by a number (and is then unknown),
        // but `1:` in `variables` is no name.
        if self.within.top { deserializer.deserialize_str(self) } else { deserializer.deserialize_any(self) }
    }
}

impl<'de> Visitor<'de> for KeySeed<'_> {
    type Value = String;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a string as key")
    }

    fn visit_str<E: Error>(self, key: &str) -> Result<String, E> {
        if self.taken.contains_key(key) {
            if !(self.within.below)(self.within.keys, key).1 {
                return Err(E::custom(format!("{key:?} is given twice")));
            }
            self.within.repeated.borrow_mut().insert(key.to_owned());
        }
        Ok(key.to_owned())
    }
}

/// Walks to a place and fails there, on purpose: the parser adds to its errors where
/// they are, and says so nowhere else.
#[derive(Clone, Copy)]
struct Probe<'a> {
    path: &'a [Step],
    at_key: bool,
}

impl<'de> DeserializeSeed<'de> for Probe<'_> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Probe<'_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("another value")
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut access: A) -> Result<(), A::Error> {
        let Some((Step::Index(wanted), rest)) = self.path.split_first() else {
            return Err(A::Error::custom("here"));
        };
        for _ in 0..*wanted {
            access.next_element::<IgnoredAny>()?;
        }
        access.next_element_seed(Probe { path: rest, ..self })?;
        Err(A::Error::custom("gone"))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut access: A) -> Result<(), A::Error> {
        let Some((Step::Key(wanted), rest)) = self.path.split_first() else {
            return Err(A::Error::custom("here"));
        };
        let fails = rest.is_empty() && self.at_key;
        while let Some(found) = access.next_key_seed(KeyProbe { wanted, fails })? {
            if found {
                return access.next_value_seed(Probe { path: rest, ..self });
            }
            access.next_value::<IgnoredAny>()?;
        }
        Err(A::Error::custom("gone"))
    }
}

/// Says whether a key is the wanted one, or fails at it.
struct KeyProbe<'a> {
    wanted: &'a str,
    fails: bool,
}

impl<'de> DeserializeSeed<'de> for KeyProbe<'_> {
    type Value = bool;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<bool, D::Error> {
        deserializer.deserialize_str(self)
    }
}

impl<'de> Visitor<'de> for KeyProbe<'_> {
    type Value = bool;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a string as key")
    }

    fn visit_str<E: Error>(self, key: &str) -> Result<bool, E> {
        match key == self.wanted {
            true if self.fails => Err(E::custom("here")),
            found => Ok(found),
        }
    }
}
