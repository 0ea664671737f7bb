//! What keeps one kind of fault away each. All of it holds, but in the tests that show that the
//! [model](crate::model) finds the fault by itself once it does not.

/// One kind of fault, by what happens where nothing keeps it away.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Mend {
    /// KubeVirt says that the guest runs on the target, which nothing opens.
    ShutThoughKubevirtSays,
    /// The same, of the guest's own frames.
    ShutThoughHeard,
    /// The Southbound has the port where neither end of the migration is.
    BoundElsewhere,
    /// What its owner chose since is overwritten.
    NewerChoice,
    /// A migration that has moved nothing takes the ports over.
    MovedNothing,
    /// A migration leaves from where a record has its guest.
    RecordedSource,
    /// A list that the guest has left keeps it off the network.
    LeftoverList,
}

#[cfg(not(test))]
impl Mend {
    pub(crate) const fn holds(self) -> bool {
        let _ = self;
        true
    }
}

#[cfg(test)]
thread_local! {
    static OMITTED: std::cell::Cell<Option<Mend>> = const { std::cell::Cell::new(None) };
}

#[cfg(test)]
impl Mend {
    pub(crate) fn holds(self) -> bool {
        OMITTED.get() != Some(self)
    }

    /// Runs `work` on this thread as if this were not there.
    pub(crate) fn omitted<T>(self, work: impl FnOnce() -> T) -> T {
        OMITTED.set(Some(self));
        let result = work();
        OMITTED.set(None);
        result
    }
}
