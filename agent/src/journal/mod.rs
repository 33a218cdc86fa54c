//! The journal on disk: one entry per worker that we have touched.
//!
//! ```text
//!  DIR/journal.redb
//!    meta      "format" ─► 1
//!    workers   "BOOT/PIDNS/PID/START" ─► an Entry, encoded (version, checksum)
//! ```
//!
//! The database is redb: a commit is on the disk when it returns, and a file
//! whose writer was killed is found as of its last commit. Its checksums are
//! looked at whenever it is opened; each entry has one of its own besides.
//!
//! A pid names a worker only on this boot and in this pid namespace, so both
//! are in the key. Entries of other boots and of processes that are gone are
//! dropped when the agent starts.
//!
//! It can be away: on a full or read-only disk, or because it was made by
//! another version. Then nothing is patched, what is fused stays fused, and
//! reverts go by the workers' own records. It is tried again with each write.
//! One that is damaged is set aside under another name, and a new one begun.

mod backend;
#[cfg(test)]
mod tests;

use std::fs::{self, OpenOptions};
use std::io::ErrorKind;
use std::os::unix::fs::OpenOptionsExt as _;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{SystemTime, UNIX_EPOCH};

use nightgraft_patcher::journal::{Entry, Journal, JournalError, Unreadable};
use redb::{
    Builder, Database, ReadableDatabase as _, ReadableTable as _, TableDefinition, TableError,
};

use crate::faults::{self, hit};

const META: TableDefinition<'_, &str, u64> = TableDefinition::new("meta");
const WORKERS: TableDefinition<'_, &str, &[u8]> = TableDefinition::new("workers");
/// Format of the tables.
const FORMAT: u64 = 1;
/// Memory that the database may use, in bytes: an entry has up to some 150 KB.
const CACHE: usize = 4 << 20;
/// The database's name in the agent's directory.
const NAME: &str = "journal.redb";

/// What identifies pids: the boot, and the pid namespace that numbers them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Epoch {
    /// `/proc/sys/kernel/random/boot_id`.
    pub boot: String,
    /// The inode of the agent's pid namespace.
    pub pids: String,
}

impl Epoch {
    /// The present one.
    ///
    /// # Errors
    /// `/proc` cannot be read.
    pub fn present() -> std::io::Result<Epoch> {
        let boot = fs::read_to_string("/proc/sys/kernel/random/boot_id")?;
        let pids = fs::read_link("/proc/self/ns/pid")?;
        let digits = |text: &str| text.chars().filter(char::is_ascii_digit).collect();
        Ok(Epoch {
            boot: boot.trim().to_owned(),
            pids: digits(&pids.to_string_lossy()),
        })
    }

    fn key(&self, pid: i32, start_time: u64) -> String {
        format!("{}/{}/{pid}/{start_time}", self.boot, self.pids)
    }
}

/// The journal of this agent.
#[derive(Debug)]
pub struct Disk {
    path: PathBuf,
    epoch: Epoch,
    state: Mutex<State>,
}

#[derive(Debug)]
enum State {
    Open(Database),
    /// Why it is away.
    Away(String),
}

/// What was found when the journal was opened.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Opening {
    /// What had to be done, in sentences.
    pub notes: Vec<String>,
    /// Entries that were dropped: of other boots, of processes that are gone,
    /// and damaged ones.
    pub dropped: usize,
    /// Living processes `(pid, start time)` that it has entries of.
    pub living: Vec<(i32, u64)>,
}

/// Why a database cannot be used.
pub(crate) enum OpenError {
    /// The file is not what was written.
    Damaged(String),
    /// It cannot be used as it is, but nothing is wrong with it.
    Away(String),
}

impl Disk {
    /// Opens the journal in `directory`, or begins one. That it is away is no
    /// error: [`Disk::away`] says why.
    #[must_use]
    pub fn open(directory: &Path, epoch: Epoch) -> (Disk, Opening) {
        let disk = Disk {
            path: directory.join(NAME),
            epoch,
            state: Mutex::new(State::Away("it was not opened yet".to_owned())),
        };
        let mut opening = Opening::default();
        let opened = match disk.opened() {
            Err(OpenError::Damaged(why)) => match disk.set_aside() {
                Ok(to) => {
                    opening.notes.push(format!(
                        "the journal {} was damaged ({why}): it is set aside as {}, and the \
                         workers' own records are gone by",
                        disk.path.display(),
                        to.display()
                    ));
                    disk.opened()
                }
                Err(cause) => Err(OpenError::Away(format!(
                    "it is damaged ({why}) and cannot be set aside: {cause}"
                ))),
            },
            other => other,
        };
        let state = match opened {
            Ok(database) => State::Open(database),
            Err(OpenError::Damaged(why) | OpenError::Away(why)) => State::Away(disk.told(&why)),
        };
        *disk.lock() = state;
        disk.prune(&mut opening);
        (disk, opening)
    }

    /// A journal that is away for good.
    #[must_use]
    pub fn without(directory: &Path, epoch: Epoch, why: String) -> Disk {
        Disk {
            path: directory.join(NAME),
            epoch,
            state: Mutex::new(State::Away(why)),
        }
    }

    /// Where it is.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Why it is away; `None` while it is not.
    #[must_use]
    pub fn away(&self) -> Option<String> {
        match &*self.lock() {
            State::Open(_) => None,
            State::Away(why) => Some(why.clone()),
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn told(&self, why: &str) -> String {
        format!("{}: {why}", self.path.display())
    }

    /// The database, checked, of our format.
    fn opened(&self) -> Result<Database, OpenError> {
        hit(faults::JOURNAL_OPEN);
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .custom_flags(nix::libc::O_NOFOLLOW)
            .open(&self.path)
            .map_err(|cause| OpenError::Away(format!("it cannot be opened: {cause}")))?;
        let open = || -> Result<Database, redb::Error> {
            let database = Builder::new()
                .set_cache_size(CACHE)
                .set_check_integrity_on_open(true)
                .create_with_backend(backend::Backend::new(file)?)?;
            Ok(database)
        };
        // What is not a database at all can make it panic.
        let database = guarded(open)?;
        let format = guarded(|| format_of(&database))?;
        if format != FORMAT {
            return Err(OpenError::Away(format!(
                "it is of format {format}, and this agent knows format {FORMAT}: use the agent \
                 that wrote it, or move it away"
            )));
        }
        Ok(database)
    }

    /// Gives the file another name.
    fn set_aside(&self) -> std::io::Result<PathBuf> {
        let now = SystemTime::now().duration_since(UNIX_EPOCH);
        let mut number = now.map_or(0, |since| since.as_secs());
        loop {
            let to = self.path.with_file_name(format!("{NAME}.damaged-{number}"));
            if fs::symlink_metadata(&to).is_err() {
                fs::rename(&self.path, &to)?;
                hit(faults::JOURNAL_SET_ASIDE);
                return Ok(to);
            }
            number += 1;
        }
    }

    /// Drops what is of other boots or of the dead.
    fn prune(&self, opening: &mut Opening) {
        let keys = match self.with(keys) {
            Ok(keys) => keys,
            Err(error) => {
                if self.away().is_none() {
                    opening.notes.push(error.to_string());
                }
                return;
            }
        };
        let mut useless = Vec::new();
        for key in keys {
            match self.whose(&key) {
                Whose::Dead => useless.push(key),
                Whose::Living(pid, start_time) => match self.decoded(&key) {
                    Ok(_) => opening.living.push((pid, start_time)),
                    Err(why @ Unreadable::Damaged(_)) => {
                        opening.notes.push(format!(
                            "the journal has {why} for worker {pid}: it is dropped, and the \
                                 worker's own record gone by"
                        ));
                        useless.push(key);
                    }
                    Err(why @ Unreadable::OtherFormat { .. }) => {
                        opening.notes.push(format!(
                            "worker {pid} is not patched: the journal has {why}"
                        ));
                    }
                },
                Whose::Elsewhere => {}
            }
        }
        if useless.is_empty() {
            return;
        }
        match self.with(|database| remove(database, &useless)) {
            Ok(()) => opening.dropped = useless.len(),
            Err(error) => opening.notes.push(error.to_string()),
        }
        hit(faults::JOURNAL_PRUNED);
    }

    fn whose(&self, key: &str) -> Whose {
        let mut fields = key.split('/');
        let (Some(boot), Some(pids), Some(pid), Some(start_time)) =
            (fields.next(), fields.next(), fields.next(), fields.next())
        else {
            return Whose::Dead;
        };
        if boot != self.epoch.boot {
            return Whose::Dead;
        }
        if pids != self.epoch.pids {
            return Whose::Elsewhere;
        }
        match (pid.parse(), start_time.parse()) {
            (Ok(pid), Ok(start_time)) if crate::live::started(pid) == Some(start_time) => {
                Whose::Living(pid, start_time)
            }
            _ => Whose::Dead,
        }
    }

    /// Does something with the database, which is opened anew where it was
    /// away. After a failure it is away: redb uses no database on which a
    /// write has failed.
    fn with<T>(
        &self,
        act: impl FnOnce(&Database) -> Result<T, redb::Error>,
    ) -> Result<T, JournalError> {
        let mut state = self.lock();
        if let State::Away(_) = &*state {
            match self.opened() {
                Ok(database) => *state = State::Open(database),
                // One that is damaged is dealt with when an agent starts.
                Err(OpenError::Damaged(why) | OpenError::Away(why)) => {
                    *state = State::Away(self.told(&why));
                }
            }
        }
        let database = match &*state {
            State::Open(database) => database,
            State::Away(why) => return Err(JournalError(why.clone())),
        };
        match guarded(|| act(database)) {
            Ok(value) => Ok(value),
            Err(OpenError::Damaged(why) | OpenError::Away(why)) => {
                let why = self.told(&why);
                // Dropped first, so that the file can be opened again.
                *state = State::Away(why.clone());
                Err(JournalError(why))
            }
        }
    }
}

enum Whose {
    Dead,
    Living(i32, u64),
    /// Of another pid namespace: not for us to judge.
    Elsewhere,
}

impl Journal for Disk {
    fn write(&self, entry: &Entry) -> Result<(), JournalError> {
        let key = self.epoch.key(entry.pid, entry.start_time);
        if entry.is_settled() && entry.record.is_none() {
            if self.bytes(&key)?.is_none() {
                return Ok(());
            }
            return self.with(|database| remove(database, std::slice::from_ref(&key)));
        }
        let bytes = entry
            .encode()
            .map_err(|error| JournalError(error.to_string()))?;
        // Another agent's is not ours to overwrite.
        if let Err(why @ Unreadable::OtherFormat { .. }) = self.decoded(&key) {
            return Err(self.holds(entry.pid, &why));
        }
        #[cfg(feature = "fault-points")]
        faults::refuse_write()?;
        self.with(|database| {
            hit(faults::JOURNAL_BEGIN);
            let transaction = database.begin_write()?;
            transaction
                .open_table(WORKERS)?
                .insert(key.as_str(), bytes.as_slice())?;
            hit(faults::JOURNAL_INSERTED);
            transaction.commit()?;
            hit(faults::JOURNAL_COMMITTED);
            Ok(())
        })
    }

    fn entry(&self, pid: i32, start_time: u64) -> Result<Option<Entry>, JournalError> {
        let key = self.epoch.key(pid, start_time);
        let Some(bytes) = self.bytes(&key)? else {
            return Ok(None);
        };
        let entry = Entry::decode(&bytes).map_err(|why| self.holds(pid, &why))?;
        if (entry.pid, entry.start_time) != (pid, start_time) {
            return Err(JournalError(self.told(&format!(
                "for worker {pid} it holds the entry of worker {}",
                entry.pid
            ))));
        }
        Ok(Some(entry))
    }
}

impl Disk {
    fn holds(&self, pid: i32, why: &Unreadable) -> JournalError {
        JournalError(self.told(&format!("for worker {pid} it holds {why}")))
    }

    /// An entry, if one is there and the journal is not away.
    fn decoded(&self, key: &str) -> Result<Option<Entry>, Unreadable> {
        match self.bytes(key) {
            Ok(Some(bytes)) => Entry::decode(&bytes).map(Some),
            Ok(None) | Err(_) => Ok(None),
        }
    }

    fn bytes(&self, key: &str) -> Result<Option<Vec<u8>>, JournalError> {
        self.with(|database| {
            let transaction = database.begin_read()?;
            let table = match transaction.open_table(WORKERS) {
                Err(TableError::TableDoesNotExist(_)) => return Ok(None),
                other => other?,
            };
            Ok(table.get(key)?.map(|value| value.value().to_vec()))
        })
    }
}

/// The format that the tables are of; a new database gets ours.
fn format_of(database: &Database) -> Result<u64, redb::Error> {
    let transaction = database.begin_read()?;
    match transaction.open_table(META) {
        Err(TableError::TableDoesNotExist(_)) => {}
        other => {
            if let Some(format) = other?.get("format")? {
                return Ok(format.value());
            }
        }
    }
    drop(transaction);
    let transaction = database.begin_write()?;
    transaction.open_table(META)?.insert("format", FORMAT)?;
    transaction.commit()?;
    Ok(FORMAT)
}

fn keys(database: &Database) -> Result<Vec<String>, redb::Error> {
    let transaction = database.begin_read()?;
    let table = match transaction.open_table(WORKERS) {
        Err(TableError::TableDoesNotExist(_)) => return Ok(Vec::new()),
        other => other?,
    };
    let mut keys = Vec::new();
    for item in table.iter()? {
        keys.push(item?.0.value().to_owned());
    }
    Ok(keys)
}

fn remove(database: &Database, keys: &[String]) -> Result<(), redb::Error> {
    let transaction = database.begin_write()?;
    {
        let mut table = transaction.open_table(WORKERS)?;
        for key in keys {
            table.remove(key.as_str())?;
        }
    }
    transaction.commit()?;
    Ok(())
}

/// Runs something in the database. What it panics of is damage.
pub(crate) fn guarded<T>(act: impl FnOnce() -> Result<T, redb::Error>) -> Result<T, OpenError> {
    match catch_unwind(AssertUnwindSafe(act)) {
        Ok(Ok(value)) => Ok(value),
        Ok(Err(error)) => Err(judged(error)),
        Err(_) => Err(OpenError::Damaged(
            "the database's code panicked".to_owned(),
        )),
    }
}

fn judged(error: redb::Error) -> OpenError {
    use redb::Error;
    match error {
        Error::Corrupted(why) => OpenError::Damaged(why),
        Error::Io(cause)
            if matches!(
                cause.kind(),
                ErrorKind::InvalidData | ErrorKind::UnexpectedEof
            ) =>
        {
            OpenError::Damaged(cause.to_string())
        }
        // The tables are not what they were made as.
        error @ (Error::TableTypeMismatch { .. }
        | Error::TableIsMultimap(_)
        | Error::TypeDefinitionChanged { .. }) => OpenError::Damaged(error.to_string()),
        Error::Io(cause) => OpenError::Away(cause.to_string()),
        other => OpenError::Away(other.to_string()),
    }
}
