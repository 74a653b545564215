//! From plain values to typed ones. Nothing stops at the first mistake: each is
//! noted with its path, so that one run shows all that is wrong with a file.

use std::collections::{BTreeMap, BTreeSet};

use serde_json::Value;

use super::source::{Problem, Step};

/// What is wrong so far, and where the decoder stands.
#[derive(Debug, Default)]
pub struct Problems {
    found: Vec<Problem>,
    ignored: Vec<Problem>,
    path: Vec<Step>,
}

impl Problems {
    /// Decodes something inside the current value.
    pub fn inside<T>(&mut self, step: Step, decode: impl FnOnce(&mut Self) -> T) -> T {
        self.path.push(step);
        let result = decode(self);
        self.path.pop();
        result
    }

    /// [`Self::inside`] for a key.
    pub fn at<T>(&mut self, key: &str, decode: impl FnOnce(&mut Self) -> T) -> T {
        self.inside(Step::Key(key.to_owned()), decode)
    }

    /// Notes what is wrong with the current value.
    pub fn note(&mut self, message: impl Into<String>) {
        self.found.push(Problem { path: self.path.clone(), at_key: false, message: message.into() });
    }

    /// Notes that `key` of the current value should not be there.
    pub fn note_key(&mut self, key: &str, message: impl Into<String>) {
        let problem = self.at_key(key, message.into());
        self.found.push(problem);
    }

    /// Notes that `key` of the current value has no effect, which is not wrong.
    pub fn ignore_key(&mut self, key: &str, message: impl Into<String>) {
        let problem = self.at_key(key, message.into());
        self.ignored.push(problem);
    }

    fn at_key(&self, key: &str, message: String) -> Problem {
        Problem { path: [self.path.as_slice(), &[Step::Key(key.to_owned())]].concat(), at_key: true, message }
    }

    /// Notes that the current value, `value`, is not what was expected.
    pub fn unexpected(&mut self, value: &Value, expected: &str) {
        self.note(format!("expected {expected}, found {}", describe(value)));
    }

    /// How much is wrong so far.
    pub fn count(&self) -> usize {
        self.found.len()
    }

    /// All that is wrong, in the order in which it was found.
    pub fn into_found(self) -> Vec<Problem> {
        self.found
    }

    /// All that has no effect.
    pub fn take_ignored(&mut self) -> Vec<Problem> {
        std::mem::take(&mut self.ignored)
    }
}

/// A value in an error text: its kind, and what it is where that is short.
fn describe(value: &Value) -> String {
    match value {
        Value::Null => "nothing".to_owned(),
        Value::Bool(value) => format!("the boolean {value}"),
        Value::Number(value) => format!("the number {value}"),
        Value::String(text) if text.chars().count() <= 40 => format!("the string {text:?}"),
        Value::String(_) => "a long string".to_owned(),
        Value::Array(_) => "a list".to_owned(),
        Value::Object(_) => "a mapping".to_owned(),
    }
}

/// A type that a field of a treefile can have.
pub trait Decode: Sized {
    /// Decodes `value`; none after a mistake was noted.
    fn decode(value: &Value, problems: &mut Problems) -> Option<Self>;
}

impl Decode for bool {
    fn decode(value: &Value, problems: &mut Problems) -> Option<Self> {
        let decoded = value.as_bool();
        if decoded.is_none() {
            problems.unexpected(value, "true or false");
        }
        decoded
    }
}

impl Decode for u32 {
    fn decode(value: &Value, problems: &mut Problems) -> Option<Self> {
        let decoded = value.as_u64().and_then(|number| Self::try_from(number).ok());
        if decoded.is_none() {
            problems.unexpected(value, "a number from 0 to 4294967295");
        }
        decoded
    }
}

impl Decode for String {
    fn decode(value: &Value, problems: &mut Problems) -> Option<Self> {
        match value {
            Value::String(text) => return Some(text.clone()),
            Value::Bool(_) | Value::Number(_) => problems.unexpected(value, "a string (quote it)"),
            _ => problems.unexpected(value, "a string"),
        }
        None
    }
}

impl Decode for Value {
    fn decode(value: &Value, _problems: &mut Problems) -> Option<Self> {
        Some(value.clone())
    }
}

impl<T: Decode> Decode for Vec<T> {
    fn decode(value: &Value, problems: &mut Problems) -> Option<Self> {
        let Value::Array(items) = value else {
            problems.unexpected(value, "a list");
            return None;
        };
        // All items are looked at, also behind one that is wrong.
        let decoded: Vec<Option<T>> = items
            .iter()
            .enumerate()
            .map(|(index, item)| problems.inside(Step::Index(index), |problems| T::decode(item, problems)))
            .collect();
        decoded.into_iter().collect()
    }
}

impl Decode for BTreeSet<String> {
    fn decode(value: &Value, problems: &mut Problems) -> Option<Self> {
        Vec::decode(value, problems).map(|names| names.into_iter().collect())
    }
}

impl<T: Decode> Decode for BTreeMap<String, T> {
    fn decode(value: &Value, problems: &mut Problems) -> Option<Self> {
        let Value::Object(entries) = value else {
            problems.unexpected(value, "a mapping");
            return None;
        };
        let decoded: Vec<_> = entries
            .iter()
            .map(|(key, value)| Some((key.clone(), problems.at(key, |problems| T::decode(value, problems))?)))
            .collect();
        decoded.into_iter().collect()
    }
}

impl Decode for (String, String) {
    fn decode(value: &Value, problems: &mut Problems) -> Option<Self> {
        match value {
            Value::Array(items) if items.len() == 2 => {
                let mut pair = Vec::<String>::decode(value, problems)?.into_iter();
                pair.next().zip(pair.next())
            }
            _ => {
                problems.unexpected(value, "a list of two strings");
                None
            }
        }
    }
}

/// Decodes the field `key` of `value`, a mapping, that must be there.
pub fn required<T: Decode>(value: &Value, key: &str, problems: &mut Problems) -> Option<T> {
    match value.get(key) {
        None | Some(Value::Null) => {
            problems.note(format!("{key:?} is missing"));
            None
        }
        Some(inner) => problems.at(key, |problems| T::decode(inner, problems)),
    }
}

/// Decodes the field `key` of `value`, a mapping, if it is there.
pub fn optional<T: Decode>(value: &Value, key: &str, problems: &mut Problems) -> Option<T> {
    let inner = value.get(key).filter(|inner| !inner.is_null())?;
    problems.at(key, |problems| T::decode(inner, problems))
}

/// The one of `names` that `given` was meant to be, if one is near: up to a third
/// of its letters wrong, doubled, missing or swapped with the next.
pub fn nearest<'a>(given: &str, names: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
    let given = given.to_lowercase().replace('_', "-");
    let limit = (given.chars().count() / 3).max(1);
    names
        .into_iter()
        .map(|name| (distance(&given, name), name))
        .filter(|&(distance, _)| distance <= limit)
        .min_by_key(|&(distance, _)| distance)
        .map(|(_, name)| name)
}

/// Edits between two words: insert, delete, replace, swap neighbours.
fn distance(from: &str, to: &str) -> usize {
    let (from, to): (Vec<char>, Vec<char>) = (from.chars().collect(), to.chars().collect());
    let mut rows: Vec<Vec<usize>> = vec![(0..=to.len()).collect()];
    for (i, a) in from.iter().enumerate() {
        let mut row = vec![i + 1];
        for (j, b) in to.iter().enumerate() {
            let mut least = (rows[i][j] + usize::from(a != b)).min(rows[i][j + 1] + 1).min(row[j] + 1);
            if i > 0 && j > 0 && *a == to[j - 1] && from[i - 1] == *b {
                least = least.min(rows[i - 1][j - 1] + 1);
            }
            row.push(least);
        }
        rows.push(row);
    }
    rows[from.len()][to.len()]
}

#[cfg(test)]
mod tests {
    use super::{distance, nearest};

    #[test]
    fn a_near_name_is_found_and_a_far_one_is_not() {
        for (from, to, edits) in [("", "abc", 3), ("abc", "abc", 0), ("acb", "abc", 1), ("abd", "abc", 1)] {
            assert_eq!(distance(from, to), edits, "{from} {to}");
        }
        let names = ["packages", "repos", "ref", "exclude-packages"];
        for (given, near) in [
            ("packges", Some("packages")),
            ("exclude_packages", Some("exclude-packages")),
            ("Repos", Some("repos")),
            ("refs", Some("ref")),
            ("no-such-key", None),
        ] {
            assert_eq!(nearest(given, names), near, "{given}");
        }
    }
}
