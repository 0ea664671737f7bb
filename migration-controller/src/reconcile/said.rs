//! What has been said already, where the same would be said at every look.

use std::collections::BTreeMap;
use std::sync::{Mutex, PoisonError};

use handover::VmName;

use super::Reconciler;
use super::hindrance::in_vain;
use crate::ovn::View;
use crate::policy::Policy;

/// The last word on each matter.
#[derive(Debug, Default)]
pub(crate) struct Said(Mutex<BTreeMap<String, String>>);

impl Said {
    /// Whether there is something new to say about a matter. With `None` there is nothing any more,
    /// and whatever comes next is new.
    pub(super) fn is_news(&self, matter: &str, word: Option<&str>) -> bool {
        let mut said = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(word) = word else {
            said.remove(matter);
            return false;
        };
        if said.get(matter).is_some_and(|last| last == word) {
            return false;
        }
        said.insert(matter.to_owned(), word.to_owned());
        true
    }
}

impl Reconciler {
    /// Says which addresses of the VM's get no place, once.
    pub(super) fn mention_placeless(&self, vm: &VmName, view: &View) {
        let matters = [
            (
                "disputed",
                &view.places.disputed,
                "ports of other VMs have these addresses as well; they get no place",
            ),
            (
                "reserved",
                &view.places.reserved,
                "these addresses are the place sets' own ballast; they get no place",
            ),
        ];
        for (matter, addresses, why) in matters {
            let word = (!addresses.is_empty()).then(|| format!("{addresses:?}"));
            if self
                .said
                .is_news(&format!("{matter} {vm}"), word.as_deref())
            {
                tracing::warn!(%vm, ?addresses, "{why}");
            }
        }
    }

    /// Says, once, what a policy asks for in vain.
    pub(super) fn mention(&self, policy: &Policy) {
        let name = policy.name();
        let flip = self.settings(Some(policy)).flip;
        let why = in_vain(policy, flip, self.databases.cluster_router());
        if let Some(why) = why
            && self.said.is_news(&format!("policy {name}"), Some(why))
        {
            tracing::warn!(policy = name, "{why}");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_word_is_news_until_it_is_said_and_again_when_it_had_passed() {
        let said = Said::default();
        assert!(said.is_news("w0", Some("a")));
        assert!(!said.is_news("w0", Some("a")));
        assert!(said.is_news("w1", Some("a")), "another matter");
        assert!(said.is_news("w0", Some("b")));
        assert!(!said.is_news("w0", None));
        assert!(said.is_news("w0", Some("b")));
    }
}
