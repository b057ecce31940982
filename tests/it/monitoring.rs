//! Metrics, alerts and dashboard, checked with a real Prometheus.

use std::collections::{BTreeMap, BTreeSet};

use kube::Api;
use kube::api::{DeleteParams, Patch, PatchParams};
use serde_json::{Value, json};
use zitadel_tokens::api::ZitadelInstance;
use zitadel_tokens::controller::metrics::described;

use crate::support::eventually;
use crate::support::managed::{CLUSTER, Managed};
use crate::support::prometheus::{Prometheus, ROOT, promtool};
use crate::support::world::{World, everything, one_token};

const RULES: &str = "charts/zitadel-tokens/files/rules.yaml";
const RULE_TESTS: &str = "tests/monitoring/rules_test.yaml";

fn file(path: &str) -> String {
    std::fs::read_to_string(format!("{ROOT}/{path}")).unwrap_or_else(|e| panic!("{path}: {e}"))
}

fn yaml(path: &str) -> Value {
    serde_saphyr::from_str(&file(path)).unwrap_or_else(|e| panic!("{path}: {e}"))
}

fn list(value: &Value) -> impl Iterator<Item = &Value> {
    value.as_array().into_iter().flatten()
}

fn alerts() -> Vec<Value> {
    list(&yaml(RULES)["groups"])
        .flat_map(|group| list(&group["rules"]).cloned())
        .collect()
}

#[test]
fn every_alert_fires_only_when_it_should_and_has_a_runbook() {
    let (succeeded, output) = promtool(&["test", "rules", RULE_TESTS], "");
    assert!(succeeded, "{output}");
    let tests = yaml(RULE_TESTS);
    let cases: Vec<&Value> = list(&tests["tests"])
        .flat_map(|test| list(&test["promql_expr_test"]))
        .collect();
    let (runbook, alerts) = (file("docs/monitoring.md"), alerts());
    assert!(!alerts.is_empty());
    for alert in alerts {
        let name = alert["alert"].as_str().expect("a name");
        let of = |fires: bool| {
            cases.iter().any(|case| {
                let queried = case["expr"]
                    .as_str()
                    .is_some_and(|e| e.contains(&format!("\"{name}\"")));
                queried && (list(&case["exp_samples"]).next().is_some() == fires)
            })
        };
        assert!(
            of(true) && of(false),
            "tests/monitoring/rules_test.yaml needs a case in which {name} fires and one in which it does not"
        );
        assert!(
            runbook.contains(&format!("\n### {name}\n")),
            "docs/monitoring.md has no section {name}"
        );
        let url = alert["annotations"]["runbook_url"].as_str().unwrap_or_default();
        assert!(
            url.ends_with(&format!("/docs/monitoring.md#{}", name.to_lowercase())),
            "{url}"
        );
        // The expression must keep each label that an annotation uses.
        let used = Used::of(alert["expr"].as_str().expect("an expression"));
        let annotations = alert["annotations"].to_string();
        for label in annotations.split("$labels.").skip(1).map(identifier) {
            assert!(used.grouped.contains(label), "{name}: the expression drops {label}");
        }
    }
}

/// A world in which every metric has a series: a fresh token, a failing token, a key with an expiry and an unreachable
/// instance.
async fn world_with_all_series(test: &str) -> World {
    let world = World::new(test).await;
    world.instance().await;
    let user = world.issuer.user(json!({"tokenType": "JWT"})).await;
    let ends = json!({"expirationDate": "2036-01-01T00:00:00Z"});
    let (_, key) = world.issuer.key(&user.id, ends).await;
    world.secret("billing-key", json!({"key.json": key})).await;
    world
        .service_user("billing", one_token("billing-token"))
        .await
        .expect("accepted");
    world
        .service_user("keyless", one_token("no-token"))
        .await
        .expect("accepted");
    let mut spec = one_token("lost-token");
    spec["instanceRef"] = json!({"name": format!("{}-down", world.name)});
    spec["keySecretRef"] = json!({"name": "billing-key"});
    world.service_user("lost", spec).await.expect("accepted");
    let mut spec = world.instance_spec();
    // Nothing listens on the discard port.
    spec["connection"]["endpoint"] = json!("http://127.0.0.1:9");
    let down = json!({
        "apiVersion": "zitadel-tokens.dev/v1alpha1", "kind": "ZitadelInstance", "spec": spec,
        "metadata": {"name": format!("{}-down", world.name), "labels": {"test": world.instance}},
    });
    let policy = json!({
        "apiVersion": "zitadel-tokens.dev/v1alpha1", "kind": "ZitadelAccessPolicy",
        "metadata": {"name": format!("{}-down", world.name)},
        "spec": {"instanceRef": {"name": format!("{}-down", world.name)}, "namespaceSelector": {}, "audiences": everything()},
    });
    let policies = world.policies();
    policies
        .patch(
            &format!("{}-down", world.name),
            &PatchParams::apply("tests"),
            &Patch::Apply(&policy),
        )
        .await
        .expect("a policy");
    let api: Api<ZitadelInstance> = Api::all(world.client.clone());
    api.patch(
        &format!("{}-down", world.name),
        &PatchParams::apply("tests"),
        &Patch::Apply(&down),
    )
    .await
    .expect("an instance");
    world
}

/// Name and labels of each metric family in the Prometheus text format, without `le`, which the format adds.
fn families(exposed: &str) -> BTreeMap<String, BTreeSet<String>> {
    let mut families = BTreeMap::<String, BTreeSet<String>>::new();
    let mut name = String::new();
    for line in exposed.lines() {
        if let Some(typed) = line.strip_prefix("# TYPE ") {
            typed.split(' ').next().expect("a name").clone_into(&mut name);
            families.entry(name.clone()).or_default();
        } else if !line.starts_with('#') {
            assert!(line.starts_with(&name), "{line} belongs to no metric family");
            let labels = families.get_mut(&name).expect("typed");
            labels.extend(Used::of(line).selected.into_values().flatten().filter(|l| l != "le"));
        }
    }
    families
}

/// The metrics in the operator's table, each with its labels.
fn table(per_object: bool) -> BTreeMap<String, BTreeSet<String>> {
    let those = described::ALL.iter().filter(|m| per_object || !m.is_per_object());
    let named = |m: &described::Described| m.labels.iter().map(|l| (*l).to_owned()).collect();
    those.map(|m| (m.name.to_owned(), named(m))).collect()
}

/// Starts the operator, and waits until it has replaced a key, created a user and granted a role.
async fn operate(world: World, flags: &[&str]) -> Managed {
    let operator = world.rotating_operator_with(&[&CLUSTER[..], flags].concat()).await;
    let managed = Managed::with_operator(world, operator).await;
    managed.promote("IAM_OWNER").await;
    managed
        .allow_roles(json!([{"instance": true, "roles": ["IAM_OWNER_VIEWER"]}]))
        .await;
    let world = &managed.world;
    world.simple("rotated", json!({"tokenType": "JWT"})).await;
    let mut spec = one_token("rotated-token");
    spec["keyRotation"] = json!({"interval": "1h"});
    spec["managerRoles"] = json!([{"instance": true, "roles": ["IAM_OWNER_VIEWER"]}]);
    world.service_user("rotated", spec).await.expect("accepted");
    managed.roles_are("rotated", "True", "ManagerRolesGranted").await;
    managed.user("created", json!({})).await;
    world.ready("created", "True", "Issued").await;
    eventually("the rotations are counted", async || {
        let (_, exposed) = managed.operator.get("/metrics").await;
        exposed.contains(&format!(
            "key_rotations_total{{zitadel_instance=\"{}\"}} 2",
            world.instance
        ))
    })
    .await;
    managed
}

#[tokio::test(flavor = "multi_thread")]
async fn served_metrics_match_the_metrics_table() {
    let world = world_with_all_series("metrics").await;
    let managed = operate(world, &[]).await;
    let Managed { world, operator, .. } = &managed;
    world.ready("billing", "True", "Issued").await;
    world.ready("keyless", "False", "KeySecretMissing").await;
    eventually("the circuit opens", async || {
        let (_, exposed) = operator.get("/metrics").await;
        exposed.contains(&format!("circuit_open{{zitadel_instance=\"{}-down\"}} 1", world.name))
    })
    .await;
    let (status, exposed) = operator.get("/metrics").await;
    assert_eq!(status, 200);
    let (succeeded, output) = promtool(&["check", "metrics"], &exposed);
    assert!(succeeded && output.is_empty(), "{output}");
    assert_eq!(families(&exposed), table(true));

    // The metrics agree with the status.
    let status = world.ready("billing", "True", "Issued").await.status.expect("a status");
    let value = |metric: &str, name: &str| {
        let line = exposed
            .lines()
            .find(|l| l.starts_with(metric) && l.contains(&format!(",name=\"{name}\",")));
        line.and_then(|l| l.rsplit(' ').next()?.parse::<f64>().ok())
    };
    let at = |time: Option<k8s_openapi::apimachinery::pkg::apis::meta::v1::Time>| {
        time.map(|t| t.0.as_duration().as_secs_f64())
    };
    let token = status.tokens[0].clone();
    assert_eq!(
        value("zitadel_tokens_token_expiration_timestamp_seconds", "billing"),
        at(token.expires_at)
    );
    assert_eq!(
        value("zitadel_tokens_token_refresh_timestamp_seconds", "billing"),
        at(token.renew_at)
    );
    assert_eq!(
        value("zitadel_tokens_key_expiration_timestamp_seconds", "billing"),
        at(status.key_expires_at)
    );
    assert_eq!(value("zitadel_tokens_service_user_ready", "billing"), Some(1.0));
    assert_eq!(value("zitadel_tokens_service_user_ready", "keyless"), Some(0.0));
    let keyless = world.ready("keyless", "False", "KeySecretMissing").await.status;
    let failing = keyless.expect("a status").tokens.swap_remove(0);
    assert_eq!(
        value("zitadel_tokens_token_failing_since_timestamp_seconds", "keyless"),
        at(failing.failing_since)
    );
    let (up, down) = (&world.instance, format!("{}-down", world.name));
    for line in [
        format!("instance_up{{zitadel_instance=\"{up}\",reason=\"InstanceReady\"}} 1"),
        format!("instance_up{{zitadel_instance=\"{down}\",reason=\"InstanceUnreachable\"}} 0"),
        format!("admin_credential_up{{zitadel_instance=\"{up}\",reason=\"AdminCredentialReady\"}} 1"),
        format!("instance_circuit_open{{zitadel_instance=\"{up}\"}} 0"),
        format!("token_requests_total{{zitadel_instance=\"{up}\",result=\"success\",reason=\"Issued\"}} 3"),
        format!("key_rotations_total{{zitadel_instance=\"{up}\"}} 2"),
        format!("service_user_changes_total{{zitadel_instance=\"{up}\",action=\"create\"}} 1"),
        format!("manager_role_changes_total{{zitadel_instance=\"{up}\",action=\"grant\"}} 1"),
        format!(
            "token_requests_total{{zitadel_instance=\"{down}\",result=\"failure\",reason=\"InstanceUnreachable\"}} "
        ),
        "leader 1".to_owned(),
        "panics_total 0".to_owned(),
    ] {
        let line = format!("\nzitadel_tokens_{line}");
        assert!(exposed.contains(&line), "{line} is not in {exposed}");
    }
    let skew = exposed.split_once(&format!("clock_skew_seconds{{zitadel_instance=\"{up}\"}} "));
    let skew = skew.and_then(|(_, rest)| rest.lines().next()?.parse::<f64>().ok());
    assert!(skew.is_some_and(|skew| skew.abs() < 2.0), "{skew:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn totals_report_the_same_without_series_per_object() {
    let world = world_with_all_series("totals").await;
    let managed = operate(world, &["--metrics-per-object", "false"]).await;
    let Managed { world, operator, .. } = &managed;
    world.ready("billing", "True", "Issued").await;
    world.ready("keyless", "False", "KeySecretMissing").await;
    world.ready("lost", "False", "InstanceUnreachable").await;
    let (_, exposed) = operator.get("/metrics").await;
    assert_eq!(families(&exposed), table(false));
    for line in [
        "ready=\"True\",reason=\"Issued\"} 3",
        "ready=\"False\",reason=\"KeySecretMissing\"} 1",
        "state=\"fresh\"} 3",
        "state=\"missing\"} 1",
    ] {
        assert!(exposed.contains(line), "{line}: {exposed}");
    }
    assert!(!exposed.contains("billing"), "{exposed}");
}

#[tokio::test(flavor = "multi_thread")]
async fn series_end_with_their_objects_and_cannot_be_forged() {
    let world = World::new("series").await;
    let operator = world.operator().await;
    world.instance().await;
    world.simple("billing", json!({"tokenType": "JWT"})).await;
    world.ready("billing", "True", "Issued").await;
    assert!(operator.get("/metrics").await.1.contains("name=\"billing\""));

    // A status that another client wrote. Its words do not become label values, even before the operator overwrites
    // them.
    let words = json!({"status": {"conditions": [{
        "type": "Ready", "status": "Maybe", "reason": "Somebodys", "message": "", "lastTransitionTime": "2026-01-01T00:00:00Z",
    }]}});
    world
        .users()
        .patch_status("billing", &PatchParams::default(), &Patch::Merge(&words))
        .await
        .expect("written");
    world.sentinel().await;
    let (_, exposed) = operator.get("/metrics").await;
    assert!(
        !exposed.contains("Maybe") && !exposed.contains("Somebodys"),
        "{exposed}"
    );

    world
        .users()
        .delete("billing", &DeleteParams::default())
        .await
        .expect("deleted");
    eventually("the series have ended", async || {
        !operator.get("/metrics").await.1.contains("name=\"billing\"")
    })
    .await;
    let api: Api<ZitadelInstance> = Api::all(world.client.clone());
    api.delete(&world.instance, &DeleteParams::default())
        .await
        .expect("deleted");
    eventually("the series have ended", async || {
        !operator.get("/metrics").await.1.contains(&world.instance)
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn dashboard_and_alerts_query_only_existing_series() {
    let world = world_with_all_series("dashboard").await;
    let managed = operate(world, &[]).await;
    let Managed { world, operator, .. } = &managed;
    world.ready("billing", "True", "Issued").await;
    world.ready("keyless", "False", "KeySecretMissing").await;
    let prometheus = Prometheus::start(&operator.address()).await;
    prometheus.until("zitadel_tokens_instance_circuit_open == 1").await;
    // A rate needs two scrapes.
    prometheus
        .until("count_over_time(zitadel_tokens_token_request_duration_seconds_count[10s]) > 2")
        .await;
    let mut existing = BTreeMap::<String, BTreeSet<String>>::new();
    for mut series in prometheus.series("{__name__=~\"zitadel_tokens_.+\"}").await {
        let name = series.remove("__name__").expect("a name");
        existing.entry(name).or_default().extend(series.into_keys());
    }
    // The `namespace` label is the object's namespace, not the operator's.
    let samples = prometheus
        .query("zitadel_tokens_service_user_ready")
        .await
        .expect("a query");
    assert!(
        samples.iter().all(|(labels, _)| labels["namespace"] == world.name),
        "{samples:?}"
    );

    let dashboard: Value = serde_json::from_str(&file("charts/zitadel-tokens/files/dashboard.json")).expect("JSON");
    let panels = list(&dashboard["panels"]).flat_map(|panel| list(&panel["targets"]));
    let panels: Vec<(String, Option<&str>)> = panels
        .map(|target| {
            (
                target["expr"].as_str().expect("an expression").to_owned(),
                target["legendFormat"].as_str(),
            )
        })
        .collect();
    assert!(panels.len() > 10);
    let alerts = alerts();
    let alerts = alerts
        .iter()
        .map(|alert| (alert["expr"].as_str().expect("an expression").to_owned(), None));
    for (written, legend) in panels.iter().cloned().chain(alerts) {
        let expression = written
            .replace("$__rate_interval", "10s")
            .replace("$zitadel_instance", ".*")
            .replace("$namespace", ".*");
        let used = Used::of(&expression);
        assert!(!used.selected.is_empty(), "{written}");
        for (metric, labels) in &used.selected {
            let known = existing
                .get(metric)
                .unwrap_or_else(|| panic!("{written}: there is no {metric}"));
            assert!(labels.is_subset(known), "{written}: {metric} has {known:?}");
        }
        let any: BTreeSet<_> = used
            .selected
            .keys()
            .flat_map(|metric| &existing[metric])
            .cloned()
            .collect();
        assert!(used.grouped.is_subset(&any), "{written}: {any:?}");
        let result = prometheus
            .query(&expression)
            .await
            .unwrap_or_else(|e| panic!("{written}: {e}"));
        if let Some(legend) = legend {
            assert!(!result.is_empty(), "{written} shows nothing");
            for label in legend.split("{{").skip(1).map(identifier) {
                assert!(
                    result.iter().all(|(labels, _)| labels.contains_key(label)),
                    "{written}: {legend}"
                );
            }
        }
    }
    for variable in list(&dashboard["templating"]["list"]).filter(|v| v["type"] == "query") {
        let query = variable["definition"].as_str().expect("a query");
        let (metric, label) = query
            .strip_prefix("label_values(")
            .and_then(|q| q.strip_suffix(')')?.split_once(", "))
            .expect("label_values(metric, label)");
        assert!(existing[metric].contains(label), "{query}");
    }
}

/// The metrics and labels that an expression uses.
#[derive(Debug, Default)]
struct Used {
    /// The operator's metrics, each with the labels in its selectors.
    selected: BTreeMap<String, BTreeSet<String>>,
    /// Labels in grouping and join clauses.
    grouped: BTreeSet<String>,
}

impl Used {
    fn of(expression: &str) -> Self {
        let mut used = Self::default();
        let mut rest = expression;
        // The metric whose braces are open, and the word before a parenthesis.
        let (mut metric, mut braces, mut word, mut grouping) = (String::new(), false, "", false);
        while let Some(next) = rest.chars().next() {
            if next == '"' {
                // A string. None in this repository has an escaped quote.
                rest = rest[1..].split_once('"').map_or("", |(_, after)| after);
                continue;
            }
            let name = identifier(rest);
            if !name.is_empty() && !next.is_ascii_digit() {
                if braces {
                    used.selected.entry(metric.clone()).or_default().insert(name.to_owned());
                } else if grouping {
                    used.grouped.insert(name.to_owned());
                } else if name.starts_with("zitadel_tokens_") {
                    name.clone_into(&mut metric);
                    used.selected.entry(metric.clone()).or_default();
                }
                word = name;
                rest = &rest[name.len()..];
                continue;
            }
            match next {
                '{' => braces = true,
                '}' => braces = false,
                '(' => grouping = ["by", "on", "without", "ignoring", "group_left", "group_right"].contains(&word),
                ')' => grouping = false,
                _ => {}
            }
            if !next.is_whitespace() {
                word = "";
            }
            rest = &rest[next.len_utf8()..];
        }
        used
    }
}

/// The identifier at the beginning of a text.
fn identifier(text: &str) -> &str {
    let end = text.find(|c: char| !c.is_ascii_alphanumeric() && c != '_');
    &text[..end.unwrap_or(text.len())]
}

#[test]
fn parser_finds_the_metrics_and_labels_of_an_expression() {
    let used = Used::of("sum by (le, kind) (zitadel_tokens_a{x=~\"a{b\", y!=\"c\"} and on (job) zitadel_tokens_b > 2)");
    let selected: Vec<_> = used
        .selected
        .into_iter()
        .map(|(m, l)| (m, l.into_iter().collect::<String>()))
        .collect();
    assert_eq!(
        selected,
        [
            ("zitadel_tokens_a".into(), "xy".into()),
            ("zitadel_tokens_b".into(), String::new())
        ]
    );
    assert_eq!(used.grouped.into_iter().collect::<Vec<_>>(), ["job", "kind", "le"]);
}
