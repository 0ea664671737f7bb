use serde_json::{Value, json};

use super::*;

fn policy(name: &str, spec: &Value) -> Result<Policy, String> {
    let policy = json!({ "apiVersion": "segue.io/v1alpha1", "kind": "HandoverPolicy",
        "metadata": { "name": name }, "spec": spec });
    let policy: HandoverPolicy = serde_json::from_value(policy).map_err(|e| e.to_string())?;
    Policy::try_from(policy)
}

fn labels(pairs: &[(&str, &str)]) -> BTreeMap<String, String> {
    pairs
        .iter()
        .map(|&(key, value)| (key.into(), value.into()))
        .collect()
}

fn defaults() -> Settings {
    Settings {
        deadlines: Deadlines::default(),
        mode: RoutingMode::AddressSets,
        flip: FlipPolicy::default(),
        gate: GatePolicy::default(),
    }
}

#[test]
fn a_policy_selects_by_namespace_and_labels() {
    let spec = json!({ "namespaces": ["a", "b"], "vmSelector": {
        "matchLabels": { "role": "worker" },
        "matchExpressions": [
            { "key": "zone", "operator": "In", "values": ["x", "y"] },
            { "key": "stage", "operator": "NotIn", "values": ["test"] },
            { "key": "owner", "operator": "Exists" },
            { "key": "legacy", "operator": "DoesNotExist" },
        ] } });
    let policy = policy("p", &spec).unwrap();
    let fit = [("role", "worker"), ("zone", "x"), ("owner", "")];
    assert!(policy.selects("a", &labels(&fit)));
    assert!(!policy.selects("c", &labels(&fit)));
    let others: [&[(&str, &str)]; 5] = [
        &[("role", "master"), ("zone", "x"), ("owner", "")],
        &[("role", "worker"), ("zone", "z"), ("owner", "")],
        &[
            ("role", "worker"),
            ("zone", "x"),
            ("owner", ""),
            ("stage", "test"),
        ],
        &[("role", "worker"), ("zone", "x")],
        &[
            ("role", "worker"),
            ("zone", "x"),
            ("owner", ""),
            ("legacy", ""),
        ],
    ];
    for other in others {
        assert!(!policy.selects("a", &labels(other)), "{other:?}");
    }
}

#[test]
fn the_most_specific_policy_comes_first() {
    let in_order = [
        policy(
            "z",
            &json!({ "namespaces": ["a"],
            "vmSelector": { "matchLabels": { "k": "v" } } }),
        ),
        policy(
            "y",
            &json!({ "vmSelector": { "matchLabels": { "k": "v" },
            "matchExpressions": [{ "key": "l", "operator": "Exists" }] } }),
        ),
        policy(
            "x",
            &json!({ "vmSelector": { "matchLabels": { "k": "v" } } }),
        ),
        policy("w", &json!({ "namespaces": ["a"] })),
        policy("u", &json!({ "vmSelector": {} })),
        policy("v", &json!({})),
    ]
    .map(Result::unwrap);
    for pair in in_order.windows(2) {
        let [first, second] = pair else {
            unreachable!()
        };
        assert!(
            first.precedence() > second.precedence(),
            "{} before {}",
            first.name(),
            second.name()
        );
    }
}

#[test]
fn what_a_policy_leaves_out_stays_the_default() {
    let applied = policy("p", &json!({})).unwrap().apply(defaults());
    assert_eq!(applied, defaults());
    let spec = json!({ "routing": { "flip": "OnPause" }, "deadlines": { "peersSeconds": 0.5 } });
    let applied = policy("p", &spec).unwrap().apply(defaults());
    assert_eq!(applied.flip.timing, FlipTiming::OnPause);
    assert_eq!(applied.deadlines.peers, Duration::from_millis(500));
    assert_eq!(applied.deadlines.release, Deadlines::default().release);
    let spec = json!({ "routing": { "keepEgressSeconds": 90 } });
    let applied = policy("p", &spec).unwrap().apply(defaults());
    assert_eq!(applied.flip.keep_egress, Duration::from_secs(90));
    let spec = json!({ "gate": { "onTimeout": "Fail" } });
    let applied = policy("p", &spec).unwrap().apply(defaults());
    assert_eq!(applied.gate.on_timeout, OnTimeout::Fail);
    assert_eq!(applied.gate.deadline, GatePolicy::default().deadline);
    let spec = json!({ "gate": { "deadlineSeconds": 25 } });
    let applied = policy("p", &spec).unwrap().apply(defaults());
    assert_eq!(applied.gate.deadline, Duration::from_secs(25));
    assert_eq!(applied.gate.on_timeout, OnTimeout::Ignore);
    let spec = json!({ "routing": { "flip": "OnPause", "keepEgressSeconds": 0 } });
    let applied = policy("p", &spec).unwrap().apply(defaults());
    assert_eq!(applied.flip.timing, FlipTiming::OnPause);
}

#[test]
fn static_routes_keep_no_egress_whatever_the_default() {
    let mut keeping = defaults();
    keeping.flip.keep_egress = Duration::from_mins(1);
    let spec = json!({ "routing": { "mode": "StaticRoutes" } });
    let applied = policy("p", &spec).unwrap().apply(keeping);
    assert_eq!(applied.flip.keep_egress, Duration::ZERO);
}

#[test]
fn what_makes_no_sense_is_refused_with_the_field() {
    let cases = [
        (
            json!({ "routing": { "keepEgressSeconds": -1 } }),
            "keepEgressSeconds",
        ),
        (
            json!({ "routing": { "keepEgressSeconds": 86_401 } }),
            "keepEgressSeconds",
        ),
        (
            json!({ "deadlines": { "releaseSeconds": -0.5 } }),
            "releaseSeconds",
        ),
        (
            json!({ "routing": { "mode": "StaticRoutes", "keepEgressSeconds": 1 } }),
            "AddressSets",
        ),
        (
            json!({ "routing": { "flip": "OnPause", "keepEgressSeconds": 1 } }),
            "on the pause",
        ),
        (json!({ "routing": { "mode": "Magic" } }), "Magic"),
        (
            json!({ "gate": { "deadlineSeconds": 0 } }),
            "gate.deadlineSeconds",
        ),
        (
            json!({ "gate": { "deadlineSeconds": 26 } }),
            "gate.deadlineSeconds",
        ),
        (json!({ "gate": { "onTimeout": "Pray" } }), "Pray"),
        (
            json!({ "vmSelector": { "matchExpressions": [{ "key": "k", "operator": "In" }] } }),
            "k In",
        ),
        (
            json!({ "vmSelector": { "matchExpressions":
            [{ "key": "k", "operator": "Exists", "values": ["v"] }] } }),
            "k Exists",
        ),
    ];
    for (spec, word) in cases {
        let error = policy("p", &spec).unwrap_err();
        assert!(error.contains(word), "{spec}: {error}");
    }
}
