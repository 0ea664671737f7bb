//! Questions at the gate, and what is answered.

use std::collections::BTreeMap;
use std::time::Duration;

use handover::{Answer, GatePolicy, Network, Verdict, VmName, answer};
use node_hooks_api::agent as wire;
use tokio::time::Instant;

/// How many questions one node can have open. virt-handler asks one for each migration that its node
/// is the source of, and two migrate at a time where nobody sets another number.
const MOST_QUESTIONS: usize = 256;
/// How many answers are kept for the record of a migration that is not known yet.
const MOST_DECIDED: usize = 256;

/// What Kubernetes and the records say of a VM, as far as the gate is concerned.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct VmView {
    /// UID of the VirtualMachineInstance; nothing where none is known.
    pub(crate) uid: Option<String>,
    /// Its migrations, the newest first.
    pub(crate) migrations: Vec<MigrationView>,
}

/// One migration of a VM.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct MigrationView {
    /// Its UID.
    pub(crate) uid: String,
    /// KubeVirt calls it over.
    pub(crate) over: bool,
    /// How its network stands.
    pub(crate) network: Network,
}

/// An answer that somebody should hear of: it was not what was asked for.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Decided {
    /// The node whose virt-handler asked.
    pub(crate) node: String,
    /// The migration, where it was named.
    pub(crate) migration: Option<String>,
    /// What it was told.
    pub(crate) answer: Answer,
}

/// An answer, on its way.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Reply {
    pub(super) node: String,
    pub(super) question: u64,
    pub(super) answer: Answer,
    /// How long it was waited for.
    pub(super) waited: Duration,
}

/// A node has more questions open than it can have migrations.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct TooMany;

/// The questions that are open, by node and number, and the answers that are still to be recorded.
#[derive(Debug, Default)]
pub(super) struct Desk {
    open: BTreeMap<(String, u64), Question>,
    decided: BTreeMap<VmName, Vec<Decided>>,
}

#[derive(Debug)]
struct Question {
    vm: VmName,
    vmi_uid: String,
    migration: String,
    asked: Instant,
    policy: GatePolicy,
    /// As last heard.
    network: Network,
}

// === impl VmView ===

impl VmView {
    /// How the network stands of the migration that is meant.
    ///
    /// The state on a VM's instance survives its migration, so one that names a migration that is over
    /// means the one that is not.
    fn network(&self, vmi_uid: &str, migration: &str) -> Network {
        let Some(uid) = &self.uid else {
            return Network::Unknown;
        };
        if !vmi_uid.is_empty() && vmi_uid != uid {
            return Network::Unknown;
        }
        let mut migrations = self.migrations.iter();
        let named = migrations.find(|known| known.uid == migration);
        let open = || self.migrations.iter().find(|known| !known.over);
        match named {
            Some(named) if !named.over => named.network.clone(),
            Some(_) => open().map_or(Network::Unknown, |open| open.network.clone()),
            None if migration.is_empty() => open().map_or_else(
                || Network::NotWanted {
                    why: "no migration of this VM is under way".to_owned(),
                },
                |open| open.network.clone(),
            ),
            None => Network::Unknown,
        }
    }
}

// === impl Desk ===

impl Desk {
    /// Takes a question. The same one again changes nothing.
    pub(super) fn ask(
        &mut self,
        node: &str,
        question: &wire::GateQuestion,
        policy: GatePolicy,
        now: Instant,
    ) -> Result<VmName, TooMany> {
        let vm = VmName::new(&question.namespace, &question.vm);
        let key = (node.to_owned(), question.question);
        let known = self.open.contains_key(&key);
        let of_node = self.open.keys().filter(|(asker, _)| asker == node);
        if !known && of_node.count() >= MOST_QUESTIONS {
            return Err(TooMany);
        }
        self.open.entry(key).or_insert_with(|| Question {
            vm: vm.clone(),
            vmi_uid: question.vmi_uid.clone(),
            migration: question.migration_uid.clone(),
            asked: now,
            policy,
            network: Network::Unknown,
        });
        Ok(vm)
    }

    /// Forgets a question.
    pub(super) fn withdraw(&mut self, node: &str, question: u64) {
        self.open.remove(&(node.to_owned(), question));
    }

    /// Forgets what a node asked.
    pub(super) fn leave(&mut self, node: &str) {
        self.open.retain(|(asker, _), _| asker != node);
    }

    /// Answers what can be answered now that this is known of a VM.
    pub(super) fn stand(&mut self, vm: &VmName, view: &VmView, now: Instant) -> Vec<Reply> {
        let of_vm = self.open.values_mut().filter(|question| question.vm == *vm);
        for question in of_vm {
            question.network = view.network(&question.vmi_uid, &question.migration);
        }
        self.answer(now, |question| question.vm == *vm)
    }

    /// Answers what has waited long enough.
    pub(super) fn expire(&mut self, now: Instant) -> Vec<Reply> {
        self.answer(now, |_| true)
    }

    /// When the next question will have.
    pub(super) fn next_deadline(&self) -> Option<Instant> {
        let deadline = |question: &Question| question.asked + question.policy.deadline;
        self.open.values().map(deadline).min()
    }

    /// The VMs with answers that are to be recorded.
    pub(super) fn to_record(&self) -> Vec<VmName> {
        self.decided.keys().cloned().collect()
    }

    /// The answers about a VM that are to be recorded, once.
    pub(super) fn decided(&mut self, vm: &VmName) -> Vec<Decided> {
        self.decided.remove(vm).unwrap_or_default()
    }

    fn answer(&mut self, now: Instant, which: impl Fn(&Question) -> bool) -> Vec<Reply> {
        let mut replies = Vec::new();
        let mut decided = Vec::new();
        self.open.retain(|(node, number), question| {
            let waited = now.saturating_duration_since(question.asked);
            let found = which(question)
                .then(|| answer(&question.network, waited, &question.policy))
                .flatten();
            let Some(answer) = found else {
                return true;
            };
            if answer.verdict != Verdict::Go {
                let migration = Some(question.migration.clone());
                let word = Decided {
                    node: node.clone(),
                    migration: migration.filter(|uid| !uid.is_empty()),
                    answer: answer.clone(),
                };
                decided.push((question.vm.clone(), word));
            }
            replies.push(Reply {
                node: node.clone(),
                question: *number,
                answer,
                waited,
            });
            false
        });
        for (vm, word) in decided {
            self.record(vm, word);
        }
        replies
    }

    fn record(&mut self, vm: VmName, word: Decided) {
        if self.decided.len() >= MOST_DECIDED && !self.decided.contains_key(&vm) {
            self.decided.pop_first();
        }
        let words = self.decided.entry(vm).or_default();
        // virt-handler asks again after a failure; what it is told then is the same.
        if !words.contains(&word) && words.len() < MOST_QUESTIONS {
            words.push(word);
        }
    }
}

#[cfg(test)]
mod tests {
    use handover::OnTimeout;

    use super::*;

    fn vm() -> VmName {
        VmName::new("tenant", "w0")
    }

    fn question(number: u64, migration: &str) -> wire::GateQuestion {
        wire::GateQuestion {
            question: number,
            namespace: "tenant".into(),
            vm: "w0".into(),
            vmi_uid: "v-1".into(),
            migration_uid: migration.into(),
        }
    }

    fn migration(uid: &str, over: bool, network: Network) -> MigrationView {
        MigrationView {
            uid: uid.into(),
            over,
            network,
        }
    }

    fn view(migrations: Vec<MigrationView>) -> VmView {
        VmView {
            uid: Some("v-1".into()),
            migrations,
        }
    }

    fn preparing() -> Network {
        Network::Preparing {
            waiting: "no claim".into(),
        }
    }

    fn verdicts(replies: &[Reply]) -> Vec<(u64, Verdict)> {
        let reply = |reply: &Reply| (reply.question, reply.answer.verdict);
        replies.iter().map(reply).collect()
    }

    #[test]
    fn a_question_is_matched_to_the_migration_that_is_meant() {
        let ready = || migration("m-2", false, Network::Prepared);
        let last = || migration("m-1", true, preparing());
        let none = || Network::NotWanted {
            why: "no migration of this VM is under way".into(),
        };
        // (what is known, the instance's UID, the migration's, how its network stands)
        let cases = [
            (view(vec![ready()]), "v-1", "m-2", Network::Prepared),
            (view(vec![ready(), last()]), "v-1", "m-1", Network::Prepared),
            (view(vec![ready(), last()]), "v-1", "", Network::Prepared),
            (view(vec![ready()]), "", "m-2", Network::Prepared),
            (view(vec![last()]), "v-1", "m-1", Network::Unknown),
            (view(vec![last()]), "v-1", "m-2", Network::Unknown),
            (view(vec![ready()]), "v-2", "m-2", Network::Unknown),
            (view(vec![last()]), "v-1", "", none()),
            (view(vec![]), "v-1", "", none()),
            (VmView::default(), "v-1", "", Network::Unknown),
        ];
        for (view, vmi_uid, migration, expected) in cases {
            let found = view.network(vmi_uid, migration);
            assert_eq!(found, expected, "{view:?} {vmi_uid:?} {migration:?}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_question_waits_until_the_network_is_ready_and_is_answered_once() {
        let mut desk = Desk::default();
        let begin = Instant::now();
        for _ in 0..2 {
            let question = question(7, "m-1");
            desk.ask("n1", &question, GatePolicy::default(), begin)
                .unwrap();
        }
        let waiting = view(vec![migration("m-1", false, preparing())]);
        assert!(desk.stand(&vm(), &waiting, begin).is_empty());
        let ready = view(vec![migration("m-1", false, Network::Prepared)]);
        let other = VmName::new("tenant", "w1");
        assert!(desk.stand(&other, &ready, begin).is_empty(), "another VM's");
        let later = begin + Duration::from_secs(2);
        let replies = desk.stand(&vm(), &ready, later);
        assert_eq!(verdicts(&replies), [(7, Verdict::Go)]);
        assert_eq!(replies[0].waited, Duration::from_secs(2));
        assert!(desk.stand(&vm(), &ready, later).is_empty());
        assert!(desk.decided(&vm()).is_empty(), "nothing to tell anybody");
        desk.ask("n1", &question(7, "m-1"), GatePolicy::default(), later)
            .unwrap();
        let again = desk.stand(&vm(), &ready, later);
        assert_eq!(
            verdicts(&again),
            [(7, Verdict::Go)],
            "asked again, told again"
        );
    }

    #[tokio::test(start_paused = true)]
    async fn the_deadline_is_the_policys_and_is_told() {
        for (on_timeout, expected) in [
            (OnTimeout::Ignore, Verdict::GoUnprepared),
            (OnTimeout::Fail, Verdict::Fail),
        ] {
            let mut desk = Desk::default();
            let begin = Instant::now();
            let policy = GatePolicy {
                deadline: Duration::from_secs(3),
                on_timeout,
            };
            desk.ask("n1", &question(1, "m-1"), policy, begin).unwrap();
            let waiting = view(vec![migration("m-1", false, preparing())]);
            desk.stand(&vm(), &waiting, begin);
            let due = begin + policy.deadline;
            assert_eq!(desk.next_deadline(), Some(due));
            assert!(desk.expire(due - Duration::from_millis(1)).is_empty());
            assert_eq!(verdicts(&desk.expire(due)), [(1, expected)]);
            assert_eq!(desk.next_deadline(), None);
            let [word] = &desk.decided(&vm())[..] else {
                panic!("one word");
            };
            assert_eq!(
                (word.node.as_str(), word.migration.as_deref()),
                ("n1", Some("m-1"))
            );
            assert!(word.answer.reason.contains("no claim"), "{word:?}");
            assert!(desk.decided(&vm()).is_empty());
        }
    }

    #[tokio::test(start_paused = true)]
    async fn what_is_withdrawn_or_was_asked_by_who_left_is_forgotten() {
        let mut desk = Desk::default();
        let now = Instant::now();
        for (node, number) in [("n1", 1), ("n1", 2), ("n2", 1)] {
            let question = question(number, "m-1");
            desk.ask(node, &question, GatePolicy::default(), now)
                .unwrap();
        }
        desk.withdraw("n1", 1);
        desk.withdraw("n1", 99);
        desk.leave("n2");
        let ready = view(vec![migration("m-1", false, Network::Prepared)]);
        let replies = desk.stand(&vm(), &ready, now);
        assert_eq!(verdicts(&replies), [(2, Verdict::Go)]);
        assert_eq!(replies[0].node, "n1");
    }

    #[tokio::test(start_paused = true)]
    async fn a_node_cannot_ask_without_end() {
        let mut desk = Desk::default();
        let now = Instant::now();
        let mut ask = |node: &str, number: usize| {
            let question = question(u64::try_from(number).unwrap(), "m-1");
            desk.ask(node, &question, GatePolicy::default(), now)
        };
        for number in 0..MOST_QUESTIONS {
            ask("n1", number).unwrap();
        }
        assert_eq!(ask("n1", MOST_QUESTIONS), Err(TooMany));
        assert_eq!(ask("n1", 0), Ok(vm()), "that one it had");
        assert_eq!(ask("n2", 0), Ok(vm()));
    }
}
