//! What the agents of both ends are told.

use super::*;

fn arm(message: &Message) -> &wire::Arm {
    match message {
        Message::Arm(arm) => arm,
        other => panic!("no Arm but {other:?}"),
    }
}

fn disarm(message: &Message) -> &wire::Disarm {
    match message {
        Message::Disarm(disarm) => disarm,
        other => panic!("no Disarm but {other:?}"),
    }
}

#[tokio::test]
async fn both_ends_are_armed_and_in_the_end_disarmed() {
    let lab = Lab::new();
    let mut source = lab.agent("n1").await;
    let mut target = lab.agent("n2").await;
    let mut bystander = lab.agent("n3").await;
    lab.stand(&standing(false));
    let told = source.next().await;
    assert_eq!(arm(&told).side(), wire::Side::Source);
    assert_eq!(
        (arm(&told).id.clone(), &arm(&told).ports),
        (Some(id()), &ports())
    );
    let told = target.next().await;
    assert_eq!(arm(&told).side(), wire::Side::Target);
    lab.stand(&standing(true));
    assert!(source.all_said().await.is_empty(), "nothing differs for it");

    lab.over("n2");
    for (agent, stays) in [(&mut source, false), (&mut target, true)] {
        let told = agent.next().await;
        assert_eq!(disarm(&told).stays, stays);
        assert_eq!(disarm(&told).id, Some(id()));
    }
    lab.over("n2");
    assert!(target.all_said().await.is_empty());
    assert!(bystander.all_said().await.is_empty());
}

#[tokio::test]
async fn an_agent_that_connects_is_armed_for_what_is_under_way() {
    let lab = Lab::new();
    lab.stand(&standing(true));
    let mut first = lab.agent("n2").await;
    assert_eq!(arm(&first.next().await).side(), wire::Side::Target);
    drop(first);
    lab.metric("segue_agents_connected 0").await;
    let mut second = lab.agent("n2").await;
    let said = second.all_said().await;
    assert_eq!(counted(&said), BTreeMap::from([("arm", 1)]));
}

#[tokio::test]
async fn what_differs_is_said_again() {
    let lab = Lab::new();
    let mut source = lab.agent("n1").await;
    lab.stand(&standing(false));
    source.next().await;
    let mut more = standing(false);
    more.source.ports[0].addresses.push("fd00::1".into());
    lab.stand(&more);
    let told = source.next().await;
    assert_eq!(arm(&told).ports, more.source.ports);
}

#[tokio::test]
async fn an_agent_that_was_away_hears_of_the_end_when_it_is_back() {
    let lab = Lab::new();
    lab.stand(&standing(true));
    lab.over("n2");
    let mut source = lab.agent("n1").await;
    let told = source.next().await;
    assert!(!disarm(&told).stays);
    drop(source);
    lab.metric("segue_agents_connected 0").await;
    let mut source = lab.agent("n1").await;
    assert!(source.all_said().await.is_empty(), "it is told once");
    drop(source);
    lab.metric("segue_agents_connected 0").await;

    // A migration back makes that end history.
    lab.stand(&standing(true));
    lab.over("n2");
    let mut back = standing(false);
    std::mem::swap(&mut back.source, &mut back.target);
    (back.migration, back.epoch) = ("m-2".into(), 8);
    lab.stand(&back);
    let mut source = lab.agent("n1").await;
    let said = source.all_said().await;
    assert_eq!(counted(&said), BTreeMap::from([("arm", 1)]));
    assert_eq!(arm(&said[0]).side(), wire::Side::Target);
}

#[tokio::test]
async fn a_newer_handover_takes_the_place_of_an_older_one() {
    let lab = Lab::new();
    let mut agents = Vec::new();
    for node in ["n1", "n2", "n3"] {
        agents.push(lab.agent(node).await);
    }
    lab.stand(&standing(true));
    let mut newer = standing(false);
    (newer.migration, newer.epoch) = ("m-2".into(), 8);
    newer.target.node = "n3".into();
    lab.stand(&newer);
    let said = agents[1].all_said().await;
    assert_eq!(counted(&said), BTreeMap::from([("arm", 1), ("disarm", 1)]));
    assert!(!disarm(&said[1]).stays);
    let said = agents[0].all_said().await;
    let epoch = |told| arm(told).id.as_ref().unwrap().epoch;
    let epochs: Vec<_> = said.iter().map(epoch).collect();
    assert_eq!(epochs, [7, 8]);
    assert_eq!(
        counted(&agents[2].all_said().await),
        BTreeMap::from([("arm", 1)])
    );
}

#[tokio::test]
async fn a_target_that_moves_on_is_taken_leave_of() {
    let lab = Lab::new();
    let mut first = lab.agent("n2").await;
    let mut second = lab.agent("n3").await;
    lab.stand(&standing(true));
    let mut moved = standing(false);
    moved.target.node = "n3".into();
    lab.stand(&moved);
    let said = first.all_said().await;
    assert_eq!(counted(&said), BTreeMap::from([("arm", 1), ("disarm", 1)]));
    assert_eq!(arm(&second.next().await).side(), wire::Side::Target);
}
