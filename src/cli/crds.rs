//! `zitadel-tokens crds`.

use crate::api::crds;

/// Renders the custom resource definitions as one YAML stream.
pub fn yaml() -> Result<String, String> {
    let mut stream = String::new();
    for crd in crds() {
        // A JSON value has its keys in a fixed order.
        let value = serde_json::to_value(&crd).map_err(|e| e.to_string())?;
        let yaml = serde_saphyr::to_string(&value).map_err(|e| e.to_string())?;
        stream.push_str("---\n");
        stream.push_str(yaml.trim_end());
        stream.push('\n');
    }
    Ok(stream)
}

/// Prints the custom resource definitions.
pub fn print() -> Result<(), String> {
    print!("{}", yaml()?);
    Ok(())
}
