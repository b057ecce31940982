//! Generates docs/reference/api.md from the CRDs.

use std::fmt::Write as _;

use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::{
    CustomResourceDefinition, JSONSchemaProps, JSONSchemaPropsOrArray, JSONSchemaPropsOrBool,
};
use zitadel_tokens::api::crds;

const HEAD: &str = "# API reference

All kinds of the API group `zitadel-tokens.dev/v1alpha1`. Generated from the code by `make generate`.

`set` and `map by` state how server-side apply merges a list. A field without \"required\" is optional.
";

/// The whole page.
pub fn page() -> String {
    crds().iter().fold(HEAD.to_owned(), |page, crd| page + &kind(crd))
}

fn kind(crd: &CustomResourceDefinition) -> String {
    let (names, version) = (&crd.spec.names, &crd.spec.versions[0]);
    let schema = version
        .schema
        .as_ref()
        .and_then(|s| s.open_api_v3_schema.as_ref())
        .expect("a schema");
    let short = names
        .short_names
        .iter()
        .flatten()
        .map(|name| format!("`{name}`"))
        .collect::<Vec<_>>();
    let mut text = format!(
        "\n## {}\n\n{} Scope: {}. Short name: {}.\n",
        names.kind,
        sentence(schema.description.as_deref()),
        crd.spec.scope,
        short.join(", ")
    );
    // The rules of spec and status follow their fields.
    write_rules("Rules of the object", &own_rules(schema), &mut text);
    for (part, schema) in schema
        .properties
        .iter()
        .flatten()
        .filter(|(part, _)| ["spec", "status"].contains(&part.as_str()))
    {
        write!(text, "\n### {}: {part}\n\n", names.kind).expect("written");
        text.push_str("| field | type | description |\n|---|---|---|\n");
        fields("", schema, &mut text);
        write_rules("Rules across fields", &rules(schema), &mut text);
    }
    text
}

fn write_rules(heading: &str, rules: &[String], text: &mut String) {
    if rules.is_empty() {
        return;
    }
    write!(text, "\n{heading}:\n\n").expect("written");
    for rule in rules {
        writeln!(text, "* {rule}").expect("written");
    }
}

/// Writes a row for each field of `schema`; `at` is the path of `schema`.
fn fields(at: &str, schema: &JSONSchemaProps, text: &mut String) {
    for (name, field) in schema.properties.iter().flatten() {
        let path = if at.is_empty() {
            name.clone()
        } else {
            format!("{at}.{name}")
        };
        let required = if schema.required.iter().flatten().any(|r| r == name) {
            ", required"
        } else {
            ""
        };
        let description = [sentence(field.description.as_deref()), limits(field)].join(" ");
        writeln!(
            text,
            "| `{path}` | {}{required} | {} |",
            type_of(field),
            description.trim()
        )
        .expect("written");
        // The fields of a condition are standard in Kubernetes.
        if name == "conditions" {
            continue;
        }
        match &field.items {
            Some(JSONSchemaPropsOrArray::Schema(item)) => fields(&format!("{path}[]"), item, text),
            _ => fields(&path, field, text),
        }
    }
}

fn type_of(field: &JSONSchemaProps) -> String {
    let name = field.type_.as_deref().unwrap_or("any");
    match (name, &field.items, &field.additional_properties) {
        ("array", Some(JSONSchemaPropsOrArray::Schema(item)), _) => {
            let merge = match (
                field.x_kubernetes_list_type.as_deref(),
                &field.x_kubernetes_list_map_keys,
            ) {
                (Some("map"), Some(keys)) => format!(" (map by `{}`)", keys.join("`, `")),
                (Some("set"), _) => " (set)".to_owned(),
                _ => String::new(),
            };
            format!("list of {}{merge}", type_of(item))
        }
        ("object", _, Some(JSONSchemaPropsOrBool::Schema(value))) => format!("map of string to {}", type_of(value)),
        _ => match &field.format {
            Some(format) if format == "date-time" => "time (RFC 3339)".to_owned(),
            _ => name.to_owned(),
        },
    }
}

/// The bounds and the allowed values of a field.
fn limits(field: &JSONSchemaProps) -> String {
    let mut all = Vec::new();
    // The entries of a list, or the values of a map.
    let (entry, of_entry) = match (&field.items, &field.additional_properties) {
        (Some(JSONSchemaPropsOrArray::Schema(item)), _) => (Some(&**item), " characters each"),
        (_, Some(JSONSchemaPropsOrBool::Schema(value))) => (Some(&**value), " characters in each value"),
        _ => (None, ""),
    };
    if let Some(values) = &field.enum_ {
        let values: Vec<_> = values
            .iter()
            .map(|value| format!("`{}`", value.0.to_string().trim_matches('"')))
            .collect();
        all.push(format!("One of {}.", values.join(", ")));
    }
    for (least, most, of) in [
        (field.min_length, field.max_length, " characters"),
        (field.min_items, field.max_items, " entries"),
        (None, field.max_properties, " entries"),
        (
            entry.and_then(|e| e.min_length),
            entry.and_then(|e| e.max_length),
            of_entry,
        ),
    ] {
        match (least, most) {
            (Some(least), Some(most)) => all.push(format!("{least} to {most}{of}.")),
            (None, Some(most)) => all.push(format!("At most {most}{of}.")),
            _ => {}
        }
    }
    if let (Some(least), Some(most)) = (field.minimum, field.maximum) {
        all.push(format!("{least} to {most}."));
    }
    if let Some(pattern) = field.pattern.as_ref().or(entry.and_then(|e| e.pattern.as_ref())) {
        all.push(format!("Pattern `{}`.", pattern.replace('|', "\\|")));
    }
    all.join(" ")
}

/// The messages of the CEL rules of `schema` itself.
fn own_rules(schema: &JSONSchemaProps) -> Vec<String> {
    let rules = schema.x_kubernetes_validations.iter().flatten();
    rules.filter_map(|rule| rule.message.clone()).collect()
}

/// The messages of the CEL rules of `schema` and its descendants, without duplicates.
fn rules(schema: &JSONSchemaProps) -> Vec<String> {
    let mut all = own_rules(schema);
    let item = match &schema.items {
        Some(JSONSchemaPropsOrArray::Schema(item)) => Some(&**item),
        _ => None,
    };
    let children = schema.properties.iter().flatten().map(|(_, child)| child).chain(item);
    for rule in children.flat_map(rules) {
        if !all.contains(&rule) {
            all.push(rule);
        }
    }
    all
}

/// The description on one line.
fn sentence(description: Option<&str>) -> String {
    let line = description
        .unwrap_or_default()
        .split_whitespace()
        .collect::<Vec<_>>()
        .join(" ");
    line.replace('|', "\\|")
}
