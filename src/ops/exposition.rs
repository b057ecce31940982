//! How metrics look on the wire: `OpenMetrics` to who asks for it, as Prometheus does, and else the older text format, the
//! only one that many agents and `promtool check metrics` read.

use std::fmt::{self, Write};

use prometheus_client::encoding::text;
use prometheus_client::registry::Registry;

/// A text, and its type.
#[derive(Debug)]
pub struct Exposition {
    /// The value of `Content-Type`.
    pub content_type: &'static str,
    /// The metrics.
    pub text: String,
}

/// Whether `accept`, a request's header, asks for `OpenMetrics`.
#[must_use]
pub fn asks_for_open_metrics(accept: &str) -> bool {
    accept.contains("application/openmetrics-text")
}

/// The metrics of `registry`.
pub fn expose(registry: &Registry, open_metrics: bool) -> Result<Exposition, fmt::Error> {
    let mut text = String::new();
    text::encode(&mut text, registry)?;
    if open_metrics {
        return Ok(Exposition {
            content_type: "application/openmetrics-text; version=1.0.0; charset=utf-8",
            text,
        });
    }
    Ok(Exposition {
        content_type: "text/plain; version=0.0.4; charset=utf-8",
        text: older(&text)?,
    })
}

/// The same metrics in the older format. Samples look alike in both; there a family has the name of its samples, and
/// there are neither units nor infos (`OpenMetrics` 1.0, "Prometheus Compatibility").
fn older(open_metrics: &str) -> Result<String, fmt::Error> {
    let mut text = String::with_capacity(open_metrics.len());
    let mut help = None;
    for line in open_metrics.lines() {
        if let Some(described) = line.strip_prefix("# HELP ") {
            // The type, which comes next, decides about the name.
            help = described.split_once(' ');
        } else if let Some(typed) = line.strip_prefix("# TYPE ") {
            let (name, kind) = typed.split_once(' ').unwrap_or((typed, "untyped"));
            let (suffix, kind) = match kind {
                "counter" => ("_total", "counter"),
                "info" => ("_info", "gauge"),
                other => ("", other),
            };
            if let Some((_, help)) = help.take() {
                writeln!(text, "# HELP {name}{suffix} {help}")?;
            }
            writeln!(text, "# TYPE {name}{suffix} {kind}")?;
        } else if !line.starts_with('#') {
            writeln!(text, "{line}")?;
        }
    }
    Ok(text)
}

#[cfg(test)]
mod tests {
    use prometheus_client::metrics::counter::Counter;
    use prometheus_client::metrics::gauge::Gauge;
    use prometheus_client::metrics::info::Info;
    use prometheus_client::registry::Unit;

    use super::*;

    #[test]
    fn each_asker_gets_a_format_that_it_reads() {
        let mut registry = Registry::default();
        registry.register("panics", "Panics", Counter::<u64>::default());
        registry.register_with_unit("oldest", "Oldest", Unit::Seconds, Gauge::<i64>::default());
        registry.register("build", "Build", Info::new([("version", "1 # 2")]));

        let older = expose(&registry, asks_for_open_metrics("*/*")).expect("a text");
        assert_eq!(older.content_type, "text/plain; version=0.0.4; charset=utf-8");
        assert_eq!(
            older.text,
            "# HELP panics_total Panics.\n# TYPE panics_total counter\npanics_total 0\n\
             # HELP oldest_seconds Oldest.\n# TYPE oldest_seconds gauge\noldest_seconds 0\n\
             # HELP build_info Build.\n# TYPE build_info gauge\nbuild_info{version=\"1 # 2\"} 1\n"
        );

        let accept = "application/openmetrics-text;version=1.0.0,text/plain;q=0.5";
        let newer = expose(&registry, asks_for_open_metrics(accept)).expect("a text");
        assert!(newer.content_type.starts_with("application/openmetrics-text"));
        assert!(newer.text.contains("# TYPE panics counter\n") && newer.text.ends_with("# EOF\n"));
    }
}
