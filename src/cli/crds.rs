//! `zitadel-tokens crds`.

use crate::api::crds;

/// Prints the definitions as one YAML stream.
pub fn print() -> Result<(), String> {
    for crd in crds() {
        // By way of a JSON value, so that keys come in a fixed order.
        let value = serde_json::to_value(&crd).map_err(|e| e.to_string())?;
        let yaml = serde_saphyr::to_string(&value).map_err(|e| e.to_string())?;
        println!("---\n{}", yaml.trim_end());
    }
    Ok(())
}
