//! One table of a snapshot, with its indexes, behind a type-erased front.

use std::any::Any;
use std::borrow::Borrow;
use std::sync::Arc;

use imbl::{OrdMap, OrdSet};
use uuid::Uuid;

use super::Change;
use crate::{Datum, Table};

/// A table whose row type is known elsewhere. Persistent: a clone shares everything, and setting a
/// row copies what leads to it.
pub(crate) trait AnyTable: Any + Send + Sync {
    fn name(&self) -> &'static str;
    fn boxed_clone(&self) -> Box<dyn AnyTable>;
    /// The rows that are there, malformed ones included.
    fn uuids(&self) -> Vec<Uuid>;
    /// Sets a row from its columns, or removes it; the change, if a reader can see one.
    fn set(&mut self, uuid: Uuid, columns: Option<&[(&str, &Datum)]>) -> Option<Change>;
    fn malformed(&self) -> Vec<(Uuid, String)>;
}

pub(crate) struct TypedTable<T> {
    rows: OrdMap<Uuid, Arc<T>>,
    malformed: OrdMap<Uuid, String>,
    indexes: Vec<Box<dyn AnyIndex<T>>>,
}

pub(crate) trait AnyIndex<T>: Any + Send + Sync {
    fn update(&mut self, uuid: Uuid, old: Option<&T>, new: Option<&T>);
    fn boxed_clone(&self) -> Box<dyn AnyIndex<T>>;
}

/// Which rows have which keys.
pub(crate) struct KeyIndex<T, K> {
    keys: KeyFunction<T, K>,
    rows: OrdMap<K, OrdSet<Uuid>>,
}

type KeyFunction<T, K> = Arc<dyn Fn(&T) -> Vec<K> + Send + Sync>;

/// What keys of an index must be.
pub trait IndexKey: Ord + Clone + Send + Sync + 'static {}

impl<K: Ord + Clone + Send + Sync + 'static> IndexKey for K {}

impl<T: Table> TypedTable<T> {
    pub(crate) fn new() -> Self {
        Self {
            rows: OrdMap::new(),
            malformed: OrdMap::new(),
            indexes: Vec::new(),
        }
    }

    /// Adds an index to a table without rows; its position.
    pub(crate) fn add_index<K: IndexKey>(&mut self, keys: KeyFunction<T, K>) -> usize {
        self.indexes.push(Box::new(KeyIndex {
            keys,
            rows: OrdMap::new(),
        }));
        self.indexes.len() - 1
    }

    pub(crate) fn get(&self, uuid: &Uuid) -> Option<&Arc<T>> {
        self.rows.get(uuid)
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = (&Uuid, &Arc<T>)> {
        self.rows.iter()
    }

    /// The rows under `key` of the index at `position`; `None` when there is no such index.
    pub(crate) fn lookup<K, Q>(&self, position: usize, key: &Q) -> Option<Vec<(Uuid, Arc<T>)>>
    where
        K: IndexKey + Borrow<Q>,
        Q: Ord + ?Sized,
    {
        let index: &dyn Any = &**self.indexes.get(position)?;
        let index = index.downcast_ref::<KeyIndex<T, K>>()?;
        let uuids = index.rows.get(key).into_iter().flatten();
        Some(
            uuids
                .filter_map(|uuid| Some((*uuid, self.rows.get(uuid)?.clone())))
                .collect(),
        )
    }
}

impl<T: Table> AnyTable for TypedTable<T> {
    fn name(&self) -> &'static str {
        T::NAME
    }

    fn boxed_clone(&self) -> Box<dyn AnyTable> {
        Box::new(Self {
            rows: self.rows.clone(),
            malformed: self.malformed.clone(),
            indexes: self
                .indexes
                .iter()
                .map(|index| index.boxed_clone())
                .collect(),
        })
    }

    fn uuids(&self) -> Vec<Uuid> {
        self.rows
            .keys()
            .chain(self.malformed.keys())
            .copied()
            .collect()
    }

    fn set(&mut self, uuid: Uuid, columns: Option<&[(&str, &Datum)]>) -> Option<Change> {
        let decoded = columns.map(|columns| crate::value::from_columns(columns.iter().copied()));
        self.malformed.remove(&uuid);
        let new: Option<T> = match decoded.transpose() {
            Ok(new) => new,
            Err(error) => {
                tracing::warn!(table = T::NAME, %uuid, %error, "row does not fit its struct");
                self.malformed.insert(uuid, error.to_string());
                None
            }
        };
        let old = self.rows.get(&uuid).cloned();
        if old.as_deref() == new.as_ref() {
            return None;
        }
        for index in &mut self.indexes {
            index.update(uuid, old.as_deref(), new.as_ref());
        }
        let new = new.map(Arc::new);
        match &new {
            Some(new) => self.rows.insert(uuid, new.clone()),
            None => self.rows.remove(&uuid),
        };
        Some(Change::new(T::NAME, uuid, old, new))
    }

    fn malformed(&self) -> Vec<(Uuid, String)> {
        self.malformed
            .iter()
            .map(|(uuid, reason)| (*uuid, reason.clone()))
            .collect()
    }
}

impl<T: Table, K: IndexKey> AnyIndex<T> for KeyIndex<T, K> {
    fn update(&mut self, uuid: Uuid, old: Option<&T>, new: Option<&T>) {
        for key in old.map(|row| (self.keys)(row)).unwrap_or_default() {
            if let Some(rows) = self.rows.get_mut(&key) {
                rows.remove(&uuid);
                if rows.is_empty() {
                    self.rows.remove(&key);
                }
            }
        }
        for key in new.map(|row| (self.keys)(row)).unwrap_or_default() {
            self.rows.entry(key).or_default().insert(uuid);
        }
    }

    fn boxed_clone(&self) -> Box<dyn AnyIndex<T>> {
        Box::new(Self {
            keys: self.keys.clone(),
            rows: self.rows.clone(),
        })
    }
}
