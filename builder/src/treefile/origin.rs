//! Where each field was set, for messages about a treefile that is right by itself.

use std::collections::BTreeMap;
use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};

use super::fields::{FIELDS, Merging};
use super::source::{self, Step};

/// One place where a field was set.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Origin {
    file: PathBuf,
    path: Vec<Step>,
}

/// `FILE:LINE`; the line is looked up only now, for few messages need it.
impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.file.display())?;
        let text = fs::read_to_string(&self.file).unwrap_or_default();
        match source::locate(&text, &self.path, true) {
            Some((line, _)) => write!(f, ":{line}"),
            None => Ok(()),
        }
    }
}

/// Of each field, by name, the places that made its value.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Origins(BTreeMap<&'static str, Vec<Origin>>);

impl Origins {
    /// The fields of one file, or of one condition in it.
    pub fn new(file: &Path, places: Vec<(&'static str, Vec<Step>)>) -> Self {
        let origin = |(name, path)| (name, vec![Origin { file: file.to_owned(), path }]);
        Self(places.into_iter().map(origin).collect())
    }

    /// Joins the included fields' places as their values join.
    pub fn include(&mut self, included: Self) {
        for (name, origins) in included.0 {
            let own = self.0.entry(name).or_default();
            let merging = FIELDS.iter().find(|field| field.name == name).map(|field| field.merging);
            match merging {
                Some(Merging::own) => {}
                Some(Merging::first) if !own.is_empty() => {}
                _ => own.extend(origins),
            }
        }
    }

    /// Where the field `name` was set, for people: `a.yaml:3, b.yaml:7`.
    pub fn of(&self, name: &str) -> String {
        let origins = self.0.get(name).into_iter().flatten();
        origins.map(ToString::to_string).collect::<Vec<_>>().join(", ")
    }
}
