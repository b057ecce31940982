//! How metrics look on the wire: `OpenMetrics` to who asks for it, as Prometheus does, and else the older text format, the
//! only one that many agents and `promtool check metrics` read.

use std::fmt;
use std::sync::Arc;

use prometheus_client::encoding::text;
use prometheus_client::registry::Registry;

/// About how many bytes of a text are sent at once.
const PART: usize = 16 * 1024;

/// The metrics of `registry`, in `OpenMetrics`.
pub fn expose(registry: &Registry) -> Result<String, fmt::Error> {
    let mut text = String::new();
    text::encode(&mut text, registry)?;
    Ok(text)
}

/// How metrics are sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// As they are exposed.
    OpenMetrics,
    /// The older text format of Prometheus.
    Text,
}

impl Format {
    /// The format for a request with this header `Accept`.
    #[must_use]
    pub fn asked_for_by(accept: &str) -> Self {
        if accept.contains("application/openmetrics-text") {
            Self::OpenMetrics
        } else {
            Self::Text
        }
    }

    /// The value of `Content-Type`.
    #[must_use]
    pub fn content_type(self) -> &'static str {
        match self {
            Self::OpenMetrics => "application/openmetrics-text; version=1.0.0; charset=utf-8",
            Self::Text => "text/plain; version=0.0.4; charset=utf-8",
        }
    }

    /// What was exposed, in this format, in small parts: a text can be large, and many clients may read it slowly.
    pub fn parts(self, exposed: Arc<String>) -> impl Iterator<Item = String> + Send {
        let mut at = 0;
        std::iter::from_fn(move || {
            let part = first_part(&exposed[at..]);
            at += part.len();
            match self {
                _ if part.is_empty() => None,
                Self::OpenMetrics => Some(part.to_owned()),
                Self::Text => Some(older(part)),
            }
        })
    }
}

/// Whole lines, and not the help of a family without its type.
fn first_part(text: &str) -> &str {
    let mut end = 0;
    for line in text.split_inclusive('\n') {
        end += line.len();
        if end >= PART && !line.starts_with("# HELP ") {
            break;
        }
    }
    &text[..end]
}

/// The same metrics in the older format. Samples look alike in both; there a family has the name of its samples, and
/// there are neither units nor infos (`OpenMetrics` 1.0, "Prometheus Compatibility").
fn older(open_metrics: &str) -> String {
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
                text.extend(["# HELP ", name, suffix, " ", help, "\n"]);
            }
            text.extend(["# TYPE ", name, suffix, " ", kind, "\n"]);
        } else if !line.starts_with('#') {
            text.extend([line, "\n"]);
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use prometheus_client::metrics::counter::Counter;
    use prometheus_client::metrics::gauge::Gauge;
    use prometheus_client::metrics::info::Info;
    use prometheus_client::registry::Unit;

    use super::*;

    fn sent(registry: &Registry, accept: &str) -> (&'static str, String) {
        let format = Format::asked_for_by(accept);
        let exposed = Arc::new(expose(registry).expect("a text"));
        (format.content_type(), format.parts(exposed).collect())
    }

    #[test]
    fn each_asker_gets_a_format_that_it_reads() {
        let mut registry = Registry::default();
        registry.register("panics", "Panics", Counter::<u64>::default());
        registry.register_with_unit("oldest", "Oldest", Unit::Seconds, Gauge::<i64>::default());
        registry.register("build", "Build", Info::new([("version", "1 # 2")]));

        let (content_type, older) = sent(&registry, "*/*");
        assert_eq!(content_type, "text/plain; version=0.0.4; charset=utf-8");
        assert_eq!(
            older,
            "# HELP panics_total Panics.\n# TYPE panics_total counter\npanics_total 0\n\
             # HELP oldest_seconds Oldest.\n# TYPE oldest_seconds gauge\noldest_seconds 0\n\
             # HELP build_info Build.\n# TYPE build_info gauge\nbuild_info{version=\"1 # 2\"} 1\n"
        );

        let accept = "application/openmetrics-text;version=1.0.0,text/plain;q=0.5";
        let (content_type, newer) = sent(&registry, accept);
        assert!(content_type.starts_with("application/openmetrics-text"));
        assert!(newer.contains("# TYPE panics counter\n") && newer.ends_with("# EOF\n"));
    }

    #[test]
    fn long_text_is_the_same_in_parts() {
        let mut registry = Registry::default();
        for i in 0..2_000 {
            registry.register(format!("panics_{i}"), "Panics", Counter::<u64>::default());
        }
        let exposed = Arc::new(expose(&registry).expect("a text"));
        for format in [Format::OpenMetrics, Format::Text] {
            let parts: Vec<String> = format.parts(exposed.clone()).collect();
            assert!(
                parts.len() > 5 && parts.iter().all(|part| part.len() < 2 * PART),
                "{format:?}"
            );
            let whole = match format {
                Format::OpenMetrics => exposed.to_string(),
                Format::Text => older(&exposed),
            };
            assert!(parts.concat() == whole, "{format:?}");
        }
    }
}
