//! Who waits for the controller's word on whether a migration may begin.

use std::collections::{BTreeMap, BTreeSet};

use node_hooks_api::agent::gate_answer::Verdict;
use node_hooks_api::agent::{GateAnswer, GateQuestion, GateWithdrawn};

/// Which migration of which VM a call is about.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Instance {
    /// `metadata.namespace` of the VirtualMachineInstance
    pub namespace: String,
    /// `metadata.name`
    pub name: String,
    /// `metadata.uid`
    pub uid: String,
    /// `status.migrationState.migrationUid`, empty where it is not there
    pub migration_uid: String,
}

/// A call of the node hook, until it is answered or withdrawn.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Call(pub u64);

/// Questions to the controller and the calls that wait for their answers. Calls about the same
/// migration share a question.
#[derive(Debug, Default)]
pub(super) struct Gate {
    last: u64,
    questions: BTreeMap<u64, Question>,
}

#[derive(Debug)]
struct Question {
    about: Instance,
    calls: BTreeSet<Call>,
}

impl Gate {
    /// What to ask, unless it is asked already.
    pub(super) fn ask(&mut self, call: Call, about: Instance) -> Option<GateQuestion> {
        let open = self.questions.values_mut();
        if let Some(question) = open.into_iter().find(|question| question.about == about) {
            question.calls.insert(call);
            return None;
        }
        self.last += 1;
        let asked = about.ask(self.last);
        let calls = BTreeSet::from([call]);
        self.questions.insert(self.last, Question { about, calls });
        Some(asked)
    }

    /// What to withdraw, if nobody waits for it any more.
    pub(super) fn withdraw(&mut self, call: Call) -> Option<GateWithdrawn> {
        let (&question, waiting) = self
            .questions
            .iter_mut()
            .find(|(_, question)| question.calls.contains(&call))?;
        waiting.calls.remove(&call);
        if !waiting.calls.is_empty() {
            return None;
        }
        self.questions.remove(&question);
        Some(GateWithdrawn { question })
    }

    /// Whose answer this is; nobody's, where the question is not open or the verdict says nothing.
    pub(super) fn answered(&mut self, answer: &GateAnswer) -> BTreeSet<Call> {
        if answer.verdict() == Verdict::Unspecified {
            return BTreeSet::new();
        }
        let question = self.questions.remove(&answer.question);
        question.map(|question| question.calls).unwrap_or_default()
    }

    /// Every open question, for a controller that has not heard them.
    pub(super) fn open(&self) -> impl Iterator<Item = GateQuestion> {
        let ask = |(number, question): (&u64, &Question)| question.about.ask(*number);
        self.questions.iter().map(ask)
    }

    #[cfg(test)]
    fn is_empty(&self) -> bool {
        self.questions.is_empty()
    }
}

impl Instance {
    fn ask(&self, question: u64) -> GateQuestion {
        GateQuestion {
            question,
            namespace: self.namespace.clone(),
            vm: self.name.clone(),
            vmi_uid: self.uid.clone(),
            migration_uid: self.migration_uid.clone(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn instance(migration_uid: &str) -> Instance {
        Instance {
            namespace: "demo".into(),
            name: "web".into(),
            uid: "u-1".into(),
            migration_uid: migration_uid.into(),
        }
    }

    fn answer(question: u64, verdict: Verdict) -> GateAnswer {
        GateAnswer {
            question,
            verdict: verdict.into(),
            reason: String::new(),
        }
    }

    #[test]
    fn a_call_that_comes_again_joins_the_question() {
        let mut gate = Gate::default();
        let asked = gate.ask(Call(1), instance("m-1")).unwrap();
        assert_eq!((asked.vm.as_str(), asked.vmi_uid.as_str()), ("web", "u-1"));
        assert_eq!(gate.ask(Call(2), instance("m-1")), None);
        let waiting = gate.answered(&answer(asked.question, Verdict::Go));
        assert_eq!(waiting, BTreeSet::from([Call(1), Call(2)]));
        assert!(gate.is_empty());
    }

    #[test]
    fn another_migration_is_another_question() {
        let mut gate = Gate::default();
        let first = gate.ask(Call(1), instance("m-1")).unwrap();
        let second = gate.ask(Call(2), instance("m-2")).unwrap();
        assert_ne!(first.question, second.question);
        let open: Vec<_> = gate.open().collect();
        assert_eq!(open, [first, second]);
    }

    #[test]
    fn only_the_last_call_withdraws_the_question() {
        let mut gate = Gate::default();
        let asked = gate.ask(Call(1), instance("m-1")).unwrap();
        assert_eq!(gate.ask(Call(2), instance("m-1")), None);
        assert_eq!(gate.withdraw(Call(1)), None);
        let question = asked.question;
        assert_eq!(gate.withdraw(Call(2)), Some(GateWithdrawn { question }));
        assert_eq!(gate.withdraw(Call(2)), None);
        assert!(gate.is_empty());
    }

    #[test]
    fn answers_to_nobody_and_without_a_verdict_change_nothing() {
        let mut gate = Gate::default();
        let asked = gate.ask(Call(1), instance("m-1")).unwrap();
        assert!(
            gate.answered(&answer(asked.question + 1, Verdict::Go))
                .is_empty()
        );
        let empty = answer(asked.question, Verdict::Unspecified);
        assert!(gate.answered(&empty).is_empty());
        assert_eq!(gate.open().count(), 1);
    }
}
