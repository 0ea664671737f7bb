//! Guests' places, and strays.

use super::*;

// === Places ===

/// Two ports on routed switches, of both families, and one on a switch of another kind.
fn guests() -> Plan {
    let mut plan = Plan::cluster(&DUAL[..2]);
    plan.machine("sw-c1", "w0.tenant", "10.20.1.10 fd20::10");
    plan.machine("sw-c2", "w0.tenant.blue", "10.20.1.11");
    plan.machine("flat", "w0.tenant.flat", "10.99.0.10");
    plan
}

#[tokio::test]
async fn a_flip_moves_all_addresses_of_all_ports_or_none() {
    let lab = Lab::kept(guests()).await;
    let all = texts(&["10.20.1.10", "10.20.1.11", "fd20::10"]);
    let view = lab.view("w0");
    let keys = view.places.routes.iter().map(|route| route.key.to_string());
    assert_eq!(keys.collect::<BTreeSet<_>>(), all);
    assert_eq!(view.places.gateways, texts(&["c1", "c2"]));
    assert_eq!(lab.flip(&view, Some("c1")).await, Written::Committed);
    assert_eq!(lab.members("c1"), all);

    let placed = lab.view("w0");
    let only = BTreeSet::from(["c1".to_owned()]);
    assert!(
        placed
            .places
            .routes
            .iter()
            .all(|route| route.leads_to == only)
    );
    // What it was decided on is no longer so: somebody else took one away.
    let set = Condition::eq("name", place_set("c1", Family::Ip4));
    let taken = [Mutation::delete("addresses", "10.20.1.11")];
    lab.meddle(on("Address_Set", set, taken)).await;
    assert!(matches!(
        lab.flip(&placed, Some("c2")).await,
        Written::Refused(_)
    ));
    assert_eq!(lab.members("c1"), texts(&["10.20.1.10", "fd20::10"]));
    assert!(lab.members("c2").is_empty());

    assert_eq!(
        lab.flip(&lab.view("w0"), Some("c2")).await,
        Written::Committed
    );
    assert!(lab.members("c1").is_empty());
    assert_eq!(lab.members("c2"), all);
    // Nor does a flip that was made already go through again.
    assert!(matches!(
        lab.flip(&placed, Some("c2")).await,
        Written::Refused(_)
    ));
    assert_eq!(lab.flip(&lab.view("w0"), None).await, Written::Committed);
    assert!(lab.members("c2").is_empty());
}

#[tokio::test]
async fn a_flip_is_refused_by_a_port_that_changed() {
    let meddling = [
        [Mutation::insert(
            "external_ids",
            Datum::map([("foreign", "x")]),
        )],
        [Mutation::insert(
            "options",
            Datum::map([("requested-chassis", "c2")]),
        )],
        [Mutation::insert(
            "addresses",
            Atom::from("0a:00:00:00:00:02 10.20.1.12"),
        )],
    ];
    for mutations in meddling {
        let lab = Lab::kept(guests()).await;
        let view = lab.view("w0");
        let port = Condition::eq("name", "w0.tenant.flat");
        lab.meddle(on("Logical_Switch_Port", port, mutations)).await;
        assert!(matches!(
            lab.flip(&view, Some("c1")).await,
            Written::Refused(_)
        ));
        assert!(lab.members("c1").is_empty());
    }
}

#[tokio::test]
async fn a_damaged_place_is_seen_and_mended() {
    let lab = Lab::kept(guests()).await;
    assert_eq!(
        lab.flip(&lab.view("w0"), Some("c1")).await,
        Written::Committed
    );
    let set = Condition::eq("name", place_set("c2", Family::Ip4));
    let twice = [Mutation::insert("addresses", "10.20.1.10")];
    lab.meddle(on("Address_Set", set, twice)).await;
    let view = lab.view("w0");
    let route = view
        .places
        .routes
        .iter()
        .find(|route| route.key.as_str() == "10.20.1.10");
    assert_eq!(route.unwrap().leads_to, texts(&["c1", "c2"]));
    assert_eq!(lab.flip(&view, Some("c2")).await, Written::Committed);
    assert!(lab.members("c1").is_empty());
    assert_eq!(lab.members("c2").len(), 3);
}

#[tokio::test]
async fn flips_of_different_guests_do_not_refuse_each_other() {
    let mut plan = guests();
    plan.machine("sw-c1", "w1.tenant", "10.20.1.20 fd20::20");
    let lab = Lab::kept(plan).await;
    let [w0, w1] = ["w0", "w1"].map(|vm| lab.view(vm));
    assert_eq!(lab.flip(&w0, Some("c1")).await, Written::Committed);
    assert_eq!(lab.flip(&w1, Some("c1")).await, Written::Committed);
    assert_eq!(lab.members("c1").len(), 5);
}

#[tokio::test]
async fn only_a_chassis_that_carries_every_family_of_the_guest_is_led_to() {
    let only = |networks: &'static [&'static str]| networks;
    let mut plan = Plan::cluster(&[
        ("c1", only(&["100.64.0.2/16", "fd64::2/64"])),
        ("c2", only(&["100.64.0.3/16"])),
    ]);
    plan.machine("sw-c1", "dual.tenant", "10.20.1.10 fd20::10");
    plan.machine("sw-c1", "four.tenant", "10.20.1.11");
    let lab = Lab::kept(plan).await;
    assert_eq!(lab.view("dual").places.gateways, texts(&["c1"]));
    assert_eq!(lab.view("four").places.gateways, texts(&["c1", "c2"]));
    let lacking = lab.view("dual").places.not_carried_by("c2");
    assert_eq!(lacking, BTreeSet::from([Family::Ip6]));
}

#[tokio::test]
async fn an_address_that_the_sets_have_as_ballast_gets_no_place() {
    let mut plan = Plan::cluster(DUAL);
    plan.machine("sw-c1", "w0.tenant", "192.0.2.1 10.20.1.10 2001:db8::2");
    let lab = Lab::kept(plan).await;
    let places = lab.view("w0").places;
    let keys: Vec<_> = places
        .routes
        .iter()
        .map(|route| (route.key.as_str(), route.leads_to.len()))
        .collect();
    assert_eq!(keys, [("10.20.1.10", 0)]);
    assert_eq!(places.reserved.len(), 2);
}

#[tokio::test]
async fn an_address_that_another_vm_has_too_gets_no_place() {
    let mut plan = guests();
    plan.machine("sw-c2", "x.other", "10.20.1.10");
    // On a switch that is not routed the same address is another one.
    plan.machine("flat", "y.other", "10.20.1.11");
    let lab = Lab::kept(plan).await;
    let places = lab.view("w0").places;
    let disputed: Vec<_> = places.disputed.iter().map(ToString::to_string).collect();
    assert_eq!(disputed, ["10.20.1.10"]);
    let keys: Vec<_> = places
        .routes
        .iter()
        .map(|route| route.key.as_str())
        .collect();
    assert_eq!(keys, ["10.20.1.11", "fd20::10"]);
}

// === Strays ===

#[tokio::test]
async fn an_address_without_a_port_is_taken_out_and_no_other() {
    let lab = Lab::kept(guests()).await;
    assert_eq!(
        lab.flip(&lab.view("w0"), Some("c1")).await,
        Written::Committed
    );
    assert!(strays(&lab.databases).is_empty());
    let set = Condition::eq("name", place_set("c1", Family::Ip4));
    let left = [Mutation::insert(
        "addresses",
        Datum::set(["10.20.1.77", "10.20.1.78"]),
    )];
    lab.meddle(on("Address_Set", set, left)).await;
    let suspects = strays(&lab.databases);
    assert_eq!(suspects.to_string(), "10.20.1.77, 10.20.1.78");
    // One of them gets a port in time.
    let mut plan = Plan::new();
    plan.machine("sw-new", "w7.tenant", "10.20.1.78");
    lab.meddle(plan.transaction()).await;
    assert!(soon(lab.keeper.sweep_once(&suspects)).await);
    assert_eq!(
        lab.members("c1"),
        texts(&["10.20.1.10", "10.20.1.11", "10.20.1.78", "fd20::10"])
    );
    assert!(strays(&lab.databases).is_empty());
    let before = lab.nb().generation();
    assert!(soon(lab.keeper.sweep_once(&suspects)).await);
    assert_eq!(lab.nb().generation(), before);
}

#[tokio::test]
async fn the_keeper_wakes_up_by_itself() {
    let lab = Lab::start(Plan::cluster(&DUAL[..2])).await;
    let alarms = Arc::new(Alarms::default());
    let keeper = Keeper::new(
        lab.databases.clone(),
        lab.writer.clone(),
        Arc::new(Metrics::new()),
        alarms.clone(),
        Arc::new(Deaf),
    );
    let stop = tokio_util::sync::CancellationToken::new();
    let [(_, nb), _] = lab.databases.replicas();
    let mut changed = nb.changed();
    alarms.layout();
    let written = async {
        soon(changed.changed()).await.unwrap();
        stop.cancel();
    };
    tokio::join!(keeper.run(&stop), written);
    assert!(!lab.policies().is_empty());
}
