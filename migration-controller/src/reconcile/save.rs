//! Records and Events, written to the API server.

use std::collections::BTreeMap;
use std::time::Duration;

use k8s_openapi::api::core::v1::ObjectReference;
use kube::api::{DeleteParams, Patch, PatchParams, Preconditions};
use kube::runtime::events::Event;
use kube::{Api, Error, Resource, ResourceExt};
use serde_json::json;

use super::Reconciler;
use super::news::News;
use super::record::Record;
use crate::api::{FIELD_MANAGER, Handover};

/// How long the API server may take to answer. The client itself would wait for ever for one that
/// went silent, and the VM's network with it.
const PATIENCE: Duration = Duration::from_secs(3);

/// Why a record is not stored.
#[derive(Debug, thiserror::Error)]
enum SaveError {
    /// The API server refused, or could not be reached.
    #[error(transparent)]
    Api(#[from] Error),
    /// It did not answer.
    #[error("no answer from the API server within {PATIENCE:?}")]
    Silence(#[from] tokio::time::error::Elapsed),
}

impl SaveError {
    /// Whether there is no place for the object any more.
    fn is_of_what_goes(&self) -> bool {
        let Self::Api(Error::Api(status)) = self else {
            return false;
        };
        status.is_not_found() || (status.is_forbidden() && status.message.contains("terminated"))
    }
}

impl Reconciler {
    /// Stores the records that changed and tells the news. What cannot be stored is kept for the next
    /// attempt. Says whether all went well.
    pub(super) async fn save_all(&self, records: BTreeMap<String, Record>) -> bool {
        let mut all_went_well = true;
        for (uid, mut record) in records {
            if record.orphan {
                self.keep_orphan(uid, record);
                continue;
            }
            match self.save(&mut record).await {
                Ok(()) => {
                    self.unsaved().remove(&uid);
                    for news in std::mem::take(&mut record.news) {
                        self.tell(&record, news).await;
                    }
                }
                Err(error) if record.migration.is_none() && error.is_of_what_goes() => {
                    // The namespace goes, and the record with it.
                    self.unsaved().remove(&uid);
                    tracing::debug!(namespace = record.namespace, name = record.name, %error, "gone");
                }
                Err(error) => {
                    all_went_well = false;
                    self.metrics.not_saved();
                    tracing::warn!(
                        namespace = record.namespace,
                        name = record.name,
                        error = &error as &dyn std::error::Error,
                        "Handover not stored; the network does not wait for it"
                    );
                    self.unsaved().insert(uid, record);
                }
            }
        }
        all_went_well
    }

    /// A record without an object is kept in memory for as long as it has something to do.
    fn keep_orphan(&self, uid: String, mut record: Record) {
        for news in std::mem::take(&mut record.news) {
            tracing::info!(
                namespace = record.namespace,
                vm = record.spec.vm.name,
                migration = uid,
                "mark of a vanished migration: {}",
                news.note
            );
        }
        if record.status.phase.is_final() {
            self.unsaved().remove(&uid);
        } else {
            self.unsaved().insert(uid, record);
        }
    }

    async fn save(&self, record: &mut Record) -> Result<(), SaveError> {
        let stored = tokio::time::timeout(PATIENCE, self.store(record)).await?;
        if let Err(Error::Api(status)) = &stored
            && status.is_not_found()
            && let Some(stored) = record.stored.take()
        {
            // Deleted meanwhile. Its deletion may have been seen before the answer to an earlier
            // write put it back among the known.
            self.cluster.drop_handover(&stored);
        }
        Ok(stored?)
    }

    async fn store(&self, record: &mut Record) -> Result<(), Error> {
        if record.stored.is_none() && record.migration.is_none() {
            // The Handover was deleted after its migration: there is nothing to own a new one.
            return Ok(());
        }
        let api: Api<Handover> = Api::namespaced(self.client.clone(), &record.namespace);
        let apply = PatchParams::apply(FIELD_MANAGER).force();
        let head = |metadata: serde_json::Value| {
            json!({
                "apiVersion": Handover::api_version(&()),
                "kind": Handover::kind(&()),
                "metadata": metadata,
            })
        };
        if record.is_spec_stale() {
            self.make_room(&api, record).await?;
            let mut object =
                head(json!({ "name": record.name, "ownerReferences": record.owners() }));
            object["spec"] = json!(record.spec);
            let stored = api
                .patch(&record.name, &apply, &Patch::Apply(&object))
                .await?;
            self.stored(record, stored);
        }
        if record.is_status_stale() {
            let mut object = head(json!({ "name": record.name }));
            object["status"] = json!(record.status);
            let patch = Patch::Apply(&object);
            let stored = api.patch_status(&record.name, &apply, &patch).await?;
            self.stored(record, stored);
        }
        Ok(())
    }

    /// Removes a Handover of an earlier migration of the same name, which nobody has collected yet.
    async fn make_room(&self, api: &Api<Handover>, record: &Record) -> Result<(), Error> {
        if record.stored.is_some() {
            return Ok(());
        }
        let Some(known) = api.get_opt(&record.name).await? else {
            return Ok(());
        };
        if known.spec.migration.uid == record.uid() {
            return Ok(());
        }
        let params = DeleteParams {
            preconditions: Some(Preconditions {
                uid: known.uid(),
                resource_version: None,
            }),
            ..DeleteParams::default()
        };
        api.delete(&record.name, &params).await.map(drop)
    }

    fn stored(&self, record: &mut Record, handover: Handover) {
        self.cluster.take_handover(handover.clone());
        record.stored = Some(handover.into());
    }

    /// Told at most once: an Event that cannot be published is not worth holding anything up.
    async fn tell(&self, record: &Record, news: News) {
        if let Some(phase) = news.entered {
            self.metrics.phase_entered(phase);
            if phase.is_final() {
                self.metrics.agents.over(&record.status);
            }
        }
        if let Some((phase, seconds)) = news.ended {
            self.metrics.phase_ended(phase, seconds);
        }
        let vm = &record.spec.vm.name;
        tracing::info!(
            namespace = record.namespace, vm, migration = record.name,
            phase = %record.status.phase, reason = news.reason, "{}", news.note
        );
        // Whoever looks at either object finds it.
        let migration = record.migration.as_ref();
        let migration = migration.map(|migration| migration.object_ref(&()));
        let handover = record.stored.as_ref().map(|stored| stored.object_ref(&()));
        for (about, other) in [(&migration, &handover), (&handover, &migration)] {
            let Some(about) = about else { continue };
            let event = Event {
                type_: news.event_type(),
                reason: news.reason.to_owned(),
                note: Some(news.note.clone()),
                action: "Handover".to_owned(),
                secondary: other.clone(),
            };
            self.publish(&event, about).await;
        }
    }

    async fn publish(&self, event: &Event, about: &ObjectReference) {
        let published = self.recorder.publish(event, about);
        let published = tokio::time::timeout(PATIENCE, published).await;
        if let Err(error) = published
            .map_err(SaveError::from)
            .and_then(|published| Ok(published?))
        {
            tracing::warn!(
                error = &error as &dyn std::error::Error,
                reason = event.reason,
                "Event not published"
            );
        }
    }
}
