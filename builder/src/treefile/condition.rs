//! Variables, the conditions of `conditional-include` on them, and `${name}`.

use std::collections::BTreeMap;
use std::fmt;

use schemars::JsonSchema;
use serde::Serialize;
use serde_json::Value;

use super::decode::{Decode, Problems};
use super::types::ReleaseVer;

/// The variables that hold at some place.
pub type Variables = BTreeMap<String, Variable>;

/// What a variable's name and value cannot have in them.
pub const VARIABLE_SIGNS: [char; 3] = ['$', '{', '}'];

/// The value of a variable.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, JsonSchema)]
#[serde(untagged)]
pub enum Variable {
    /// `true`
    Bool(bool),
    /// `41`
    Number(u64),
    /// `"stable"`
    Text(String),
}

impl From<&ReleaseVer> for Variable {
    fn from(version: &ReleaseVer) -> Self {
        match version {
            ReleaseVer::Number(number) => Self::Number(*number),
            ReleaseVer::Text(text) => Self::Text(text.clone()),
        }
    }
}

impl fmt::Display for Variable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Bool(value) => value.fmt(f),
            Self::Number(value) => value.fmt(f),
            Self::Text(value) => value.fmt(f),
        }
    }
}

impl Variable {
    /// Its type, for people.
    fn kind(&self) -> &'static str {
        match self {
            Self::Bool(_) => "a boolean",
            Self::Number(_) => "a number",
            Self::Text(_) => "a string",
        }
    }
}

impl Decode for Variable {
    fn decode(value: &Value, problems: &mut Problems) -> Option<Self> {
        match value {
            Value::Bool(value) => return Some(Self::Bool(*value)),
            Value::String(text) => return Some(Self::Text(text.clone())),
            value if value.is_u64() => return value.as_u64().map(Self::Number),
            value => problems.unexpected(value, "a string, a whole number from 0, true or false"),
        }
        None
    }
}

/// How a variable is compared.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Operator {
    Equal,
    NotEqual,
    LessOrEqual,
    GreaterOrEqual,
    Less,
    Greater,
}

/// Those of two characters come before their first characters.
const OPERATORS: [(&str, Operator); 6] = [
    ("==", Operator::Equal),
    ("!=", Operator::NotEqual),
    ("<=", Operator::LessOrEqual),
    (">=", Operator::GreaterOrEqual),
    ("<", Operator::Less),
    (">", Operator::Greater),
];

/// `VARIABLE OPERATOR VALUE`
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Condition {
    variable: String,
    operator: Operator,
    value: Variable,
}

impl Condition {
    /// Parses a condition.
    ///
    /// # Errors
    /// What was expected and not found.
    pub fn parse(text: &str) -> Result<Self, String> {
        let trimmed = text.trim();
        let end = trimmed.find(|c: char| !c.is_ascii_alphanumeric() && c != '_').unwrap_or(trimmed.len());
        let (variable, rest) = trimmed.split_at(end);
        if variable.is_empty() {
            return Err(format!("expected a condition such as 'stream == \"stable\"', found {text:?}"));
        }
        let rest = rest.trim_start();
        let Some(&(sign, operator)) = OPERATORS.iter().find(|(sign, _)| rest.starts_with(sign)) else {
            return Err(format!("expected one of ==, !=, <, <=, >, >= after {variable:?} in {text:?}"));
        };
        let value = match rest[sign.len()..].trim_start() {
            "true" => Variable::Bool(true),
            "false" => Variable::Bool(false),
            value => {
                let quoted = value.strip_prefix('"').and_then(|value| value.strip_suffix('"'));
                let number = || value.parse().ok().filter(|_| value.bytes().all(|b| b.is_ascii_digit()));
                match (quoted, number()) {
                    (Some(text), _) => Variable::Text(text.to_owned()),
                    (None, Some(number)) => Variable::Number(number),
                    (None, None) => {
                        return Err(format!(
                            "expected a string in double quotes, a number, true or false after {sign} in {text:?}"
                        ));
                    }
                }
            }
        };
        Ok(Self { variable: variable.to_owned(), operator, value })
    }

    /// Whether the condition holds.
    ///
    /// # Errors
    /// The variable is not defined or of another type than the value; an order is
    /// asked for what has none.
    pub fn holds(&self, variables: &Variables) -> Result<bool, String> {
        let Self { variable, operator, value } = self;
        let Some(actual) = variables.get(variable) else {
            let known: Vec<_> = variables.keys().map(String::as_str).collect();
            return Err(format!("variable {variable:?} is not defined; defined here: {}", known.join(", ")));
        };
        if actual.kind() != value.kind() {
            return Err(format!(
                "{variable:?} is {}, {actual}, and cannot be compared with {}",
                actual.kind(),
                value.kind()
            ));
        }
        match (operator, actual, value) {
            (Operator::Equal, ..) => Ok(actual == value),
            (Operator::NotEqual, ..) => Ok(actual != value),
            (Operator::Less, Variable::Number(a), Variable::Number(b)) => Ok(a < b),
            (Operator::LessOrEqual, Variable::Number(a), Variable::Number(b)) => Ok(a <= b),
            (Operator::Greater, Variable::Number(a), Variable::Number(b)) => Ok(a > b),
            (Operator::GreaterOrEqual, Variable::Number(a), Variable::Number(b)) => Ok(a >= b),
            _ => Err(format!("{variable:?} is {}: only == and != apply", actual.kind())),
        }
    }
}

/// Replaces `${name}` by the variable's value; unknown names stay as they are. So does,
/// as in rpm-ostree, a text with a `}` before the first `${`.
pub fn substitute(text: &str, variables: &Variables) -> String {
    if text.find('}') < text.find("${") {
        return text.to_owned();
    }
    let mut result = String::new();
    let mut rest = text;
    while let Some(start) = rest.find("${") {
        result.push_str(&rest[..start]);
        rest = &rest[start..];
        let known = rest.find('}').and_then(|end| Some((end, variables.get(&rest[2..end])?)));
        match known {
            Some((end, value)) => {
                result.push_str(&value.to_string());
                rest = &rest[end + 1..];
            }
            None => {
                result.push_str("${");
                rest = &rest[2..];
            }
        }
    }
    result + rest
}

#[cfg(test)]
mod tests {
    use super::{Condition, Variable, Variables, substitute};

    fn variables() -> Variables {
        [
            ("arch", Variable::Text("x86_64".to_owned())),
            ("empty", Variable::Text(String::new())),
            ("n", Variable::Number(35)),
            ("prod", Variable::Bool(true)),
        ]
        .into_iter()
        .map(|(name, value)| (name.to_owned(), value))
        .collect()
    }

    #[test]
    fn conditions_hold_or_not() {
        for (text, holds) in [
            ("arch == \"x86_64\"", true),
            ("arch != \"x86_64\"", false),
            ("  arch==\"x86_64\"  ", true),
            ("empty == \"\"", true),
            ("n < 35", false),
            ("n<=35", true),
            ("n > 34", true),
            ("n >= 36", false),
            ("n != 35", false),
            ("prod == true", true),
            ("prod != false", true),
        ] {
            assert_eq!(Condition::parse(text).and_then(|c| c.holds(&variables())), Ok(holds), "{text}");
        }
    }

    #[test]
    fn bad_conditions_are_errors() {
        for text in [
            "",
            "n",
            "n 5",
            "n =< 5",
            "n = 5",
            "n == five",
            "n == -1",
            "n == +1",
            "n == \"5",
            "== 5",
            "n == 5 6",
            "nope == 1",
            "n == \"35\"",
            "arch < \"y\"",
            "prod > false",
        ] {
            assert!(Condition::parse(text).and_then(|c| c.holds(&variables())).is_err(), "{text}");
        }
    }

    #[test]
    fn known_names_are_substituted() {
        for (text, expected) in [
            ("os/${n}/${arch}", "os/35/x86_64"),
            ("${prod}${empty}", "true"),
            ("${nope} ${", "${nope} ${"),
            ("${${n}}", "${35}"),
            ("$n {n} $", "$n {n} $"),
            ("} ${n}", "} ${n}"),
            ("${n} } ${n}", "35 } 35"),
        ] {
            assert_eq!(substitute(text, &variables()), expected, "{text}");
        }
    }
}
