//! What is found, and the rows that are kept for it.

use super::*;

// === Finding it ===

#[tokio::test]
async fn the_topology_is_found_from_the_cluster_router() {
    let mut plan = Plan::cluster(&DUAL[..2]);
    // Neither a router without a chassis on the join switch nor a switch of its own is any of ours.
    plan.router("transit", None);
    plan.connect("transit", "join", &["100.64.0.9/16"]);
    plan.router("island", Some("c9"));
    plan.connect("island", "lonely", &["10.9.0.1/24"]);
    let lab = Lab::start(plan).await;
    let (nb, topology) = lab.databases.topology().unwrap();
    let chassis: Vec<_> = topology.gateways.keys().map(String::as_str).collect();
    assert_eq!(chassis, ["c1", "c2"]);
    let gateway = &topology.gateways["c1"];
    assert_eq!(
        (gateway.name.as_str(), gateway.port.as_str()),
        ("gr-c1", "gr-c1-join")
    );
    let hops: Vec<_> = gateway
        .next_hops
        .values()
        .map(ToString::to_string)
        .collect();
    assert_eq!(hops, ["100.64.0.2", "fd64::2"]);
    let inside: Vec<_> = topology.inside.iter().map(ToString::to_string).collect();
    assert_eq!(inside, ["10.20.1.0/24", "100.64.0.0/16", "fd64::/64"]);
    let switches = topology.switches.keys();
    let switches: BTreeSet<_> = switches
        .filter_map(|uuid| Some(nb.get::<crate::ovn::LogicalSwitch>(uuid)?.name.clone()))
        .collect();
    assert_eq!(switches, texts(&["sw-c1", "sw-c2"]));
    assert!(topology.rejected.is_empty(), "{:?}", topology.rejected);
}

#[tokio::test]
async fn a_chassis_has_one_gateway_and_that_has_an_address() {
    let mut plan = Plan::cluster(&DUAL[..1]);
    plan.router("another", Some("c1"));
    plan.connect("another", "join", &["100.64.0.8/16"]);
    plan.router("mute", Some("c7"));
    plan.connect("mute", "join", &["fe80::1/64"]);
    let lab = Lab::start(plan).await;
    let (_, topology) = lab.databases.topology().unwrap();
    assert_eq!(topology.gateways.len(), 1);
    assert_eq!(topology.gateways["c1"].name, "another");
    let told = topology.rejected.join("; ");
    assert!(told.contains("gr-c1") && told.contains("mute"), "{told}");
}

// === The rows ===

#[tokio::test]
async fn the_rows_appear_and_an_unchanged_world_is_not_written_to() {
    let lab = Lab::kept(Plan::cluster(&DUAL[..2])).await;
    let [s1, s2] = ["c1", "c2"].map(|chassis| place_set(chassis, Family::Ip4));
    let [t1, t2] = ["c1", "c2"].map(|chassis| place_set(chassis, Family::Ip6));
    let expected = [
        "cluster 1110 ip4.dst == $segue_inside_ip4 allow".to_owned(),
        "cluster 1110 ip6.dst == $segue_inside_ip6 allow".to_owned(),
        format!("cluster 1100 ip4.src == ${s1} reroute 100.64.0.2"),
        format!("cluster 1100 ip4.src == ${s2} reroute 100.64.0.3"),
        format!("cluster 1100 ip6.src == ${t1} reroute fd64::2"),
        format!("cluster 1100 ip6.src == ${t2} reroute fd64::3"),
        "gr-c1 1110 inport == \"gr-c1-join\" allow".to_owned(),
        "gr-c2 1110 inport == \"gr-c2-join\" allow".to_owned(),
        "gr-c1 1110 ct.rpl allow".to_owned(),
        "gr-c2 1110 ct.rpl allow".to_owned(),
        format!("gr-c1 1100 ip4.dst == ${s2} reroute 100.64.0.3"),
        format!("gr-c2 1100 ip4.dst == ${s1} reroute 100.64.0.2"),
        format!("gr-c1 1100 ip6.dst == ${t2} reroute fd64::3"),
        format!("gr-c2 1100 ip6.dst == ${t1} reroute fd64::2"),
    ];
    assert_eq!(lab.policies(), expected.into());
    assert_eq!(lab.set(&s1), Some(texts(&["192.0.2.1", "192.0.2.2"])));
    assert_eq!(lab.set(&t2), Some(texts(&["2001:db8::1", "2001:db8::2"])));
    assert_eq!(
        lab.set(&inside_set(Family::Ip4)),
        Some(texts(&["10.20.1.0/24", "100.64.0.0/16"]))
    );
    let before = lab.nb().generation();
    assert!(soon(lab.keeper.keep_once(Instant::now())).await);
    assert_eq!(lab.nb().generation(), before);
}

#[tokio::test]
async fn a_family_that_no_gateway_has_has_no_rows_and_one_that_some_have_has_theirs() {
    let only = |networks: &'static [&'static str]| networks;
    let lab = Lab::kept(Plan::cluster(&[
        ("c1", only(&["100.64.0.2/16"])),
        ("c2", only(&["100.64.0.3/16"])),
    ]))
    .await;
    assert!(lab.policies().iter().all(|policy| !policy.contains("ip6")));
    assert_eq!(lab.set(&inside_set(Family::Ip6)), None);

    let lab = Lab::kept(Plan::cluster(&[
        ("c1", only(&["100.64.0.2/16", "fd64::2/64"])),
        ("c2", only(&["100.64.0.3/16"])),
    ]))
    .await;
    assert_eq!(lab.set(&place_set("c2", Family::Ip6)), None);
    // It has no way to the other's address.
    let astray = |policy: &String| policy.starts_with("gr-c2") && policy.contains("ip6");
    assert!(!lab.policies().iter().any(astray));
}

#[tokio::test]
async fn a_gateway_that_goes_takes_its_rows_along_and_nobody_elses() {
    let lab = Lab::kept(Plan::cluster(DUAL)).await;
    let two = Lab::kept(Plan::cluster(&DUAL[..2])).await.policies();
    let mut tx = Transaction::new();
    let foreign = Row::new()
        .set("priority", 1100)
        .set("match", "ip4.src == 10.0.0.1")
        .set("action", "drop");
    let foreign = tx.insert("Logical_Router_Policy", foreign);
    tx.mutate(
        "Logical_Router",
        Condition::eq("name", "cluster"),
        [Mutation::insert("policies", foreign)],
    );
    tx.insert("Address_Set", Row::new().set("name", "segue_theirs_ip4"));
    tx.delete("Logical_Router", Condition::eq("name", "gr-c3"));
    lab.meddle(tx).await;
    let now = Instant::now();
    assert!(soon(lab.keeper.keep_once(now)).await);
    assert!(soon(lab.keeper.keep_once(now + GONE)).await);
    assert_eq!(lab.policies(), two);
    assert_eq!(lab.set(&place_set("c3", Family::Ip4)), None);
    let mut tx = Transaction::new();
    let sets = Condition::eq("name", "segue_theirs_ip4");
    let sets = tx.select("Address_Set", sets, ["name"]);
    let policies = Condition::eq("match", "ip4.src == 10.0.0.1");
    let policies = tx.select("Logical_Router_Policy", policies, ["action"]);
    let reply = lab.other.transact(NORTHBOUND, tx).await.unwrap();
    assert_eq!(reply.raw_rows(sets).unwrap().len(), 1);
    assert_eq!(reply.raw_rows(policies).unwrap().len(), 1);
}

#[tokio::test]
async fn a_gateway_that_is_no_gateway_any_more_is_cleared() {
    let lab = Lab::kept(Plan::cluster(&DUAL[..2])).await;
    let gone = [Mutation::delete_keys("options", ["chassis"])];
    lab.meddle(on("Logical_Router", Condition::eq("name", "gr-c2"), gone))
        .await;
    let now = Instant::now();
    assert!(soon(lab.keeper.keep_once(now)).await);
    let own = |policy: &String| policy.starts_with("gr-c2");
    assert!(!lab.policies().iter().any(own), "at once");
    assert!(soon(lab.keeper.keep_once(now + GONE)).await);
    let policies = lab.policies();
    let left = |policy: &&String| policy.starts_with("gr-c2") || policy.contains("100.64.0.3");
    assert_eq!(policies.iter().find(left), None);
}

#[tokio::test]
async fn a_gateway_that_comes_back_in_time_finds_its_guests_where_they_were() {
    let lab = Lab::kept(Plan::cluster(&DUAL[..2])).await;
    let (before, set) = (lab.policies(), place_set("c2", Family::Ip4));
    let guest = [Mutation::insert("addresses", "10.20.1.10")];
    lab.meddle(on(
        "Address_Set",
        Condition::eq("name", set.as_str()),
        guest,
    ))
    .await;
    let router = || Condition::eq("name", "gr-c2");
    let gone = [Mutation::delete_keys("options", ["chassis"])];
    lab.meddle(on("Logical_Router", router(), gone)).await;
    let now = Instant::now();
    let almost = now + GONE.saturating_sub(std::time::Duration::from_millis(1));
    for at in [now, almost] {
        assert!(soon(lab.keeper.keep_once(at)).await);
        assert!(lab.set(&set).is_some_and(|set| set.contains("10.20.1.10")));
        assert!(lab.set(&inside_set(Family::Ip4)).is_some());
    }
    let back = [Mutation::insert("options", Datum::map([("chassis", "c2")]))];
    lab.meddle(on("Logical_Router", router(), back)).await;
    for at in [almost, almost + GONE] {
        assert!(soon(lab.keeper.keep_once(at)).await);
        assert_eq!(lab.policies(), before);
        assert!(lab.set(&set).is_some_and(|set| set.contains("10.20.1.10")));
    }
}

#[tokio::test]
async fn what_others_broke_is_mended_and_guests_stay_where_they_are() {
    let lab = Lab::kept(Plan::cluster(&DUAL[..2])).await;
    let (before, set) = (lab.policies(), place_set("c1", Family::Ip4));
    let mut tx = Transaction::new();
    tx.mutate(
        "Address_Set",
        Condition::eq("name", set.as_str()),
        [
            Mutation::delete("addresses", "192.0.2.2"),
            Mutation::insert("addresses", "10.20.1.10"),
        ],
    );
    tx.mutate(
        "Address_Set",
        Condition::eq("name", inside_set(Family::Ip4)),
        [
            Mutation::delete("addresses", "10.20.1.0/24"),
            Mutation::insert("addresses", "0.0.0.0/0"),
        ],
    );
    let hop = Row::new().set("nexthops", "100.64.0.66");
    let reroute = Condition::eq("match", format!("ip4.src == ${set}"));
    tx.update("Logical_Router_Policy", reroute, hop);
    lab.meddle(tx).await;
    assert_ne!(lab.policies(), before);
    assert!(soon(lab.keeper.keep_once(Instant::now())).await);
    assert_eq!(lab.policies(), before);
    assert_eq!(
        lab.set(&set),
        Some(texts(&["10.20.1.10", "192.0.2.1", "192.0.2.2"]))
    );
    assert_eq!(
        lab.set(&inside_set(Family::Ip4)),
        Some(texts(&["10.20.1.0/24", "100.64.0.0/16"]))
    );
}

#[tokio::test]
async fn rows_stay_while_there_is_no_cluster_router() {
    let lab = Lab::kept(Plan::cluster(&DUAL[..2])).await;
    let mut tx = Transaction::new();
    tx.update(
        "Logical_Router",
        Condition::eq("name", "cluster"),
        Row::new().set("name", "renamed"),
    );
    lab.meddle(tx).await;
    let before = lab.nb().generation();
    assert!(soon(lab.keeper.keep_once(Instant::now())).await);
    assert_eq!(lab.nb().generation(), before);
}

#[tokio::test]
async fn who_does_not_hold_the_lock_keeps_no_rows() {
    let lab = Lab::start(Plan::cluster(&DUAL[..2])).await;
    let _thief = lab.other.steal("segue_writer").await.unwrap();
    assert!(soon(lab.keeper.keep_once(Instant::now())).await);
    assert!(lab.policies().is_empty());
}
