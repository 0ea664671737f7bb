use std::collections::BTreeMap;

use proptest::prelude::*;
use rstest::rstest;
use uuid::Uuid;

use super::{Atom, Datum, Row};

fn atom() -> impl Strategy<Value = Atom> {
    prop_oneof![
        any::<i64>().prop_map(Atom::Integer),
        // A whole real may come back as an integer; only the schema can tell.
        (any::<i32>()).prop_map(|value| Atom::Real(f64::from(value) + 0.5)),
        any::<bool>().prop_map(Atom::Boolean),
        any::<String>().prop_map(Atom::String),
        any::<[u8; 16]>().prop_map(|bytes| Atom::Uuid(Uuid::from_bytes(bytes))),
        "[a-z_][a-z0-9_]{0,8}".prop_map(Atom::NamedUuid),
    ]
}

proptest! {
    #[test]
    fn a_value_comes_back_from_its_notation(
        datum in prop_oneof![
            proptest::collection::btree_set(atom(), 0..5).prop_map(Datum::set),
            proptest::collection::btree_map(atom(), atom(), 0..5).prop_map(Datum::map),
        ]
    ) {
        let text = serde_json::to_string(&datum).unwrap();
        prop_assert_eq!(serde_json::from_str::<Datum>(&text).unwrap(), datum);
    }
}

#[rstest]
#[case::bare(Datum::from(1_i64), "1")]
#[case::empty(Datum::empty(), r#"["set",[]]"#)]
#[case::two(Datum::from(["b", "a"]), r#"["set",["a","b"]]"#)]
#[case::map(Datum::map([("k", true)]), r#"["map",[["k",true]]]"#)]
#[case::uuid(
    Datum::from(Uuid::nil()),
    r#"["uuid","00000000-0000-0000-0000-000000000000"]"#
)]
fn values_are_written_as_the_rfc_says(#[case] datum: Datum, #[case] text: &str) {
    assert_eq!(serde_json::to_string(&datum).unwrap(), text);
}

#[test]
fn a_set_of_one_may_come_bare_or_not() {
    let datum = Datum::from("a");
    assert_eq!(serde_json::from_str::<Datum>(r#""a""#).unwrap(), datum);
    assert_eq!(
        serde_json::from_str::<Datum>(r#"["set",["a"]]"#).unwrap(),
        datum
    );
}

#[rstest]
#[case::untagged("[]")]
#[case::tag_alone(r#"["set"]"#)]
#[case::too_long(r#"["set",[],1]"#)]
#[case::unknown_tag(r#"["bag",[]]"#)]
#[case::nested(r#"["set",[["set",[]]]]"#)]
#[case::object("{}")]
#[case::null("null")]
#[case::bad_uuid(r#"["uuid","nope"]"#)]
#[case::odd_pair(r#"["map",[["k"]]]"#)]
fn what_is_no_value_is_refused(#[case] text: &str) {
    serde_json::from_str::<Datum>(text).unwrap_err();
}

#[derive(Debug, PartialEq, serde::Deserialize)]
struct Typed {
    name: String,
    port: Option<u16>,
    address: std::net::IpAddr,
    ids: Vec<Uuid>,
    weights: BTreeMap<i64, f64>,
    kind: Kind,
    text: Newtype,
    #[serde(default)]
    missing: Vec<String>,
}

#[derive(Debug, PartialEq, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
enum Kind {
    Router,
}

#[derive(Debug, PartialEq, serde::Deserialize)]
struct Newtype(Option<String>);

fn row() -> Row {
    Row::new()
        .set("name", "n")
        .set("port", 80_i64)
        .set("address", "fe80::1")
        .set("ids", Uuid::nil())
        .set("weights", Datum::map([(1_i64, 2_i64)]))
        .set("kind", "router")
        .set("text", Datum::empty())
        .set("unknown", 1_i64)
}

#[test]
fn a_row_becomes_a_struct() {
    assert_eq!(
        row().to::<Typed>().unwrap(),
        Typed {
            name: "n".into(),
            port: Some(80),
            address: "fe80::1".parse().unwrap(),
            ids: vec![Uuid::nil()],
            weights: BTreeMap::from([(1, 2.0)]),
            kind: Kind::Router,
            text: Newtype(None),
            missing: Vec::new(),
        }
    );
}

#[rstest]
#[case::too_large("port", Datum::from(65_536_i64), "65536")]
#[case::several("name", Datum::from(["a", "b"]), "exactly one value")]
#[case::none("name", Datum::empty(), "exactly one value")]
#[case::a_map("ids", Datum::map([("k", "v")]), "a set expected")]
#[case::a_set("weights", Datum::from(1_i64), "a map expected")]
#[case::unknown_variant("kind", Datum::from("bridge"), "unknown variant")]
#[case::a_number("kind", Datum::from(1_i64), "a string expected")]
fn a_value_that_does_not_fit_names_its_column(
    #[case] column: &str,
    #[case] value: Datum,
    #[case] reason: &str,
) {
    let error = row()
        .set(column, value)
        .to::<Typed>()
        .unwrap_err()
        .to_string();
    assert!(error.contains(&format!("column {column:?}")), "{error}");
    assert!(error.contains(reason), "{error}");
}
