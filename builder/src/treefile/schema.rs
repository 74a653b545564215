//! The JSON schema of treefiles in YAML (draft 2020-12), from the table of fields and
//! their types: what it takes is what the parser takes, but for what a schema cannot
//! say. Editors complete and check treefiles with it.

use std::io::{Write, stdout};

use anyhow::{Context, Result};
use schemars::generate::SchemaSettings;
use schemars::transform::transform_subschemas;
use schemars::{Schema, SchemaGenerator};
use serde_json::{Map, Value, json};

use super::fields::{self, Field};
use super::parse::{ALIASES, INCLUDES};

/// Prints the schema.
///
/// # Errors
/// Where stdout cannot be written.
pub fn main() -> Result<()> {
    writeln!(stdout().lock(), "{:#}", schema()).context("writing to stdout")
}

/// The schema of a treefile. The empty file, which is null, is one.
fn schema() -> Value {
    let settings = SchemaSettings::draft2020_12().with_transform(as_parsed);
    let mut generator = settings.into_generator();
    let mut properties = properties(&mut generator);
    let definitions = generator.take_definitions(true);
    // What a condition includes in place: the same fields, but nothing that says what to read.
    let inline: Map<String, Value> = properties
        .keys()
        .filter(|name| *name != "variables")
        .map(|name| (name.clone(), json!({"$ref": format!("#/properties/{name}")})))
        .collect();
    properties.extend(includes());
    let mut root = json!({
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "treefile",
        "description": "What an operating system is composed of: rpm-ostree's treefile language.",
        "type": ["object", "null"],
        "properties": properties,
        "patternProperties": packages_of_architectures(),
        "additionalProperties": false,
        "$defs": definitions
    });
    for part in ["/repo", "/packages/items"] {
        let schema = root.pointer_mut(&format!("/$defs/RepoPackages/properties{part}"));
        schema.expect("a part of the type")["type"] = json!(AS_WRITTEN);
    }
    root["$defs"]["Files"] = json!({
        "description": "A file's name, or several, relative to the directory of this one.",
        "type": ["string", "array"],
        "items": {"type": "string"}
    });
    root["$defs"]["Condition"] = json!({
        "description": "VARIABLE OPERATOR VALUE, such as 'stream == \"stable\"'.",
        "type": "string",
        "pattern": "^\\s*[A-Za-z0-9_]+\\s*(==|!=|<=?|>=?)\\s*(true|false|[0-9]+|\".*\")\\s*$"
    });
    root["$defs"]["Inline"] = json!({
        "description": "Fields in place of a file.",
        "type": "object",
        "properties": inline,
        "patternProperties": packages_of_architectures(),
        "additionalProperties": false
    });
    let mut root = Schema::try_from(root).expect("an object is a schema");
    as_parsed(&mut root);
    root.to_value()
}

/// The fields and their old names, with all that the table says of them.
fn properties(generator: &mut SchemaGenerator) -> Map<String, Value> {
    let mut properties = Map::new();
    for (Field { name, meaning, merging, by_dnf }, mut schema) in fields::schemas(generator) {
        let text = format!("{meaning}\n\nMerging of includes: {merging}.\n\nThe dnf engine: {by_dnf}.");
        schema.insert("description".to_owned(), text.into());
        match *name {
            "automatic-version-suffix" => {
                schema.extend([("minLength".into(), 1.into()), ("maxLength".into(), 1.into())])
            }
            "selinux-label-version" => schema.extend([("maximum".to_owned(), 1.into())]),
            "remove-from-packages" => schema["items"]["minItems"] = 1.into(),
            "packages" | "cliwrap-binaries" => schema["items"]["type"] = json!(AS_WRITTEN),
            _ => {}
        }
        properties.insert((*name).to_owned(), schema.into());
    }
    for (old, new) in ALIASES {
        let text = format!("The old name of {new:?}.");
        properties.insert(
            old.to_owned(),
            json!({"description": text, "deprecated": true, "$ref": format!("#/properties/{new}")}),
        );
    }
    let text = "Added to \"packages\", which is the place for them today.";
    properties.insert(
        "bootstrap-packages".to_owned(),
        json!({"description": text, "deprecated": true, "type": ["array", "null"], "items": {"type": "string"}}),
    );
    properties
}

/// What may stand where rpm-ostree takes YAML as it is written.
const AS_WRITTEN: [&str; 4] = ["string", "number", "boolean", "null"];

fn packages_of_architectures() -> Value {
    json!({"^packages-(?!local)": {
        "description": "Packages that are added to \"packages\" on one architecture, named as RPM does.",
        "type": "array",
        "items": {"type": "string"}
    }})
}

fn includes() -> Map<String, Value> {
    let files = json!({"$ref": "#/$defs/Files"});
    let schemas = [
        json!({"description": "Treefiles to read too.", "anyOf": [files, {"type": "null"}]}),
        json!({
            "description": "Treefiles to read too, by architecture.",
            "type": ["object", "null"],
            "additionalProperties": files
        }),
        json!({
            "description": "Treefiles, or fields in place, that are read where conditions hold.",
            "type": ["array", "null"],
            "items": {
                "type": "object",
                "required": ["if", "include"],
                "properties": {
                    "if": {
                        "description": "One condition, or several that must all hold.",
                        "anyOf": [
                            {"$ref": "#/$defs/Condition"},
                            {"type": "array", "items": {"$ref": "#/$defs/Condition"}}
                        ]
                    },
                    "include": {"anyOf": [files, {"$ref": "#/$defs/Inline"}]}
                }
            }
        }),
    ];
    INCLUDES.into_iter().map(str::to_owned).zip(schemas).collect()
}

/// A set's items may repeat; formats are not names that editors know.
fn as_parsed(schema: &mut Schema) {
    schema.remove("uniqueItems");
    schema.remove("format");
    transform_subschemas(&mut as_parsed, schema);
}
