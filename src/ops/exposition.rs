//! Formats of `/metrics`. Clients that accept `OpenMetrics`, such as Prometheus, get it. All others get the older text
//! format of Prometheus, the only one that many agents and `promtool check metrics` can read.

use std::fmt;
use std::sync::Arc;

use prometheus_client::encoding::text;
use prometheus_client::registry::Registry;

/// Approximate size of one part of a response, in bytes.
const PART: usize = 16 * 1024;

/// Encodes the metrics of `registry` as `OpenMetrics`.
pub fn expose(registry: &Registry) -> Result<String, fmt::Error> {
    let mut text = String::new();
    text::encode(&mut text, registry)?;
    Ok(text)
}

/// The format of a response.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// `OpenMetrics`, unchanged.
    OpenMetrics,
    /// The older text format of Prometheus.
    Text,
}

impl Format {
    /// The format for a request with this `Accept` header.
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

    /// Converts the output of [`expose`] to this format in small parts, because the text can be large and many clients
    /// may read it slowly.
    pub fn parts(self, exposed: Arc<String>) -> impl Iterator<Item = String> + Send {
        let mut at = 0;
        std::iter::from_fn(move || {
            let part = first_part(&exposed[at..]);
            at += part.len();
            match self {
                _ if part.is_empty() => None,
                Self::OpenMetrics => Some(part.to_owned()),
                Self::Text => Some(to_text_format(part)),
            }
        })
    }
}

/// The first part of `text`. It ends after a whole line and never between the help and the type of a metric family.
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

/// Converts metrics to the older format. Samples are the same in both formats. In the older format a metric family has
/// the name of its samples, and there are no units and no infos (`OpenMetrics` 1.0, "Prometheus Compatibility").
fn to_text_format(open_metrics: &str) -> String {
    let mut text = String::with_capacity(open_metrics.len());
    let mut help = None;
    for line in open_metrics.lines() {
        if let Some(described) = line.strip_prefix("# HELP ") {
            // The name depends on the type, which is on the next line.
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
    fn format_follows_the_accept_header() {
        let mut registry = Registry::default();
        registry.register("panics", "Panics", Counter::<u64>::default());
        registry.register_with_unit("oldest", "Oldest", Unit::Seconds, Gauge::<i64>::default());
        registry.register("build", "Build", Info::new([("version", "1 # 2")]));

        let (content_type, to_text_format) = sent(&registry, "*/*");
        assert_eq!(content_type, "text/plain; version=0.0.4; charset=utf-8");
        assert_eq!(
            to_text_format,
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
    fn parts_add_up_to_the_whole_text() {
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
                Format::Text => to_text_format(&exposed),
            };
            assert!(parts.concat() == whole, "{format:?}");
        }
    }
}
