//! The history's file.

use std::collections::BTreeMap;
use std::fs::{self, OpenOptions};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};

use redb::{
    Builder, Database, DatabaseError, ReadableDatabase as _, ReadableTable as _, TableDefinition,
    TableError,
};

use crate::journal::{OpenError, guarded};

const META: TableDefinition<'_, &str, u64> = TableDefinition::new("meta");
const STEPS: TableDefinition<'_, u64, &[u8]> = TableDefinition::new("steps");
/// Format of the tables, and of the values in them.
const FORMAT: u64 = 1;
/// Memory that the database may use, in bytes.
const CACHE: usize = 4 << 20;
/// The database's name in the agent's directory.
pub(super) const NAME: &str = "history.redb";

/// The file, which may be away.
#[derive(Debug)]
pub(super) struct Disk {
    path: PathBuf,
    database: Result<Database, String>,
}

/// What cannot be used, and why.
enum Unusable {
    /// The file is not what was written, or not of our format: the name that it
    /// gets, and why.
    SetAside(String, String),
    Away(String),
}

impl From<OpenError> for Unusable {
    fn from(error: OpenError) -> Unusable {
        match error {
            OpenError::Damaged(why) => {
                Unusable::SetAside(format!("{NAME}.damaged"), format!("was damaged ({why})"))
            }
            OpenError::Away(why) => Unusable::Away(why),
        }
    }
}

impl Disk {
    /// One that is not opened yet.
    pub(super) fn in_directory(directory: &Path) -> Disk {
        Disk {
            path: directory.join(NAME),
            database: Err("it was not opened yet".to_owned()),
        }
    }

    /// Why it is away; `None` while it is not.
    pub(super) fn away(&self) -> Option<String> {
        let why = self.database.as_ref().err()?;
        Some(format!("{}: {why}", self.path.display()))
    }

    /// Opens the file, or begins one. Gives the lengths of the values in it, by
    /// time; `None` where it is away. What had to be done is noted.
    pub(super) fn open(&mut self, notes: &mut Vec<String>) -> Option<BTreeMap<u64, usize>> {
        let opened = match opened(&self.path) {
            Err(Unusable::SetAside(name, why)) => {
                // An earlier one of this name goes: they must not fill the disk.
                let to = self.path.with_file_name(name);
                match fs::rename(&self.path, &to) {
                    Ok(()) => {
                        notes.push(format!(
                            "the history {} {why}: it is set aside as {}, and a new one begun",
                            self.path.display(),
                            to.display()
                        ));
                        opened(&self.path)
                    }
                    Err(cause) => Err(Unusable::Away(format!(
                        "it {why} and cannot be set aside: {cause}"
                    ))),
                }
            }
            other => other,
        };
        match opened {
            Ok((database, lengths)) => {
                self.database = Ok(database);
                Some(lengths)
            }
            Err(Unusable::SetAside(_, why) | Unusable::Away(why)) => {
                self.database = Err(why);
                None
            }
        }
    }

    /// Takes values out and puts others in, all or none. It is on the disk when
    /// this returns.
    ///
    /// # Errors
    /// It is away, from now on at least. The values may be there nevertheless.
    pub(super) fn commit(&mut self, out: &[u64], into: &[(u64, &[u8])]) -> Result<(), ()> {
        self.with(|database| {
            let transaction = database.begin_write()?;
            {
                let mut table = transaction.open_table(STEPS)?;
                for key in out {
                    table.remove(key)?;
                }
                for (key, value) in into {
                    table.insert(key, value)?;
                }
            }
            transaction.commit()?;
            Ok(())
        })
    }

    /// Reads values; those that are not there are left out.
    ///
    /// # Errors
    /// It is away, from now on at least.
    pub(super) fn read(&mut self, keys: &[u64]) -> Result<BTreeMap<u64, Vec<u8>>, ()> {
        self.with(|database| {
            let mut values = BTreeMap::new();
            let transaction = database.begin_read()?;
            let table = match transaction.open_table(STEPS) {
                Err(TableError::TableDoesNotExist(_)) => return Ok(values),
                other => other?,
            };
            for key in keys {
                if let Some(value) = table.get(key)? {
                    values.insert(*key, value.value().to_vec());
                }
            }
            Ok(values)
        })
    }

    /// After a failure it is away: redb uses no database on which a write has
    /// failed.
    fn with<T>(&mut self, act: impl FnOnce(&Database) -> Result<T, redb::Error>) -> Result<T, ()> {
        let Ok(database) = &self.database else {
            return Err(());
        };
        guarded(|| act(database)).map_err(|error| {
            let (OpenError::Damaged(why) | OpenError::Away(why)) = error;
            self.database = Err(why);
        })
    }
}

/// The database, checked, of our format, and the lengths of its values.
fn opened(path: &Path) -> Result<(Database, BTreeMap<u64, usize>), Unusable> {
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .mode(0o600)
        .custom_flags(nix::libc::O_NOFOLLOW)
        .open(path)
        .map_err(|cause| Unusable::Away(format!("it cannot be opened: {cause}")))?;
    // What is not a database at all can make it panic.
    let opened = guarded(|| {
        let opened = Builder::new()
            .set_cache_size(CACHE)
            .set_check_integrity_on_open(true)
            .create_with_backend(backend(file)?);
        match opened {
            Err(DatabaseError::UpgradeRequired(version)) => Ok(Err(version)),
            other => Ok(Ok(other?)),
        }
    })?;
    let database = opened.map_err(|version| {
        Unusable::SetAside(
            format!("{NAME}.redb-{version}"),
            format!("is of another version of the database ({version})"),
        )
    })?;
    let format = guarded(|| format_of(&database))?;
    if format != FORMAT {
        return Err(Unusable::SetAside(
            format!("{NAME}.format-{format}"),
            format!("is of format {format}, and this agent knows format {FORMAT}"),
        ));
    }
    let lengths = guarded(|| lengths(&database))?;
    Ok((database, lengths))
}

#[cfg(test)]
use super::tests::full::Backend;
#[cfg(not(test))]
use redb::backends::FileBackend as Backend;

fn backend(file: fs::File) -> Result<Backend, DatabaseError> {
    Backend::new(file)
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

fn lengths(database: &Database) -> Result<BTreeMap<u64, usize>, redb::Error> {
    let transaction = database.begin_read()?;
    let table = match transaction.open_table(STEPS) {
        Err(TableError::TableDoesNotExist(_)) => return Ok(BTreeMap::new()),
        other => other?,
    };
    let mut lengths = BTreeMap::new();
    for item in table.iter()? {
        let (key, value) = item?;
        lengths.insert(key.value(), value.value().len());
    }
    Ok(lengths)
}

/// Stores something as a test needs it.
#[cfg(test)]
pub(super) fn plant(path: &Path, format: u64, values: &[(u64, &[u8])]) {
    let database = Database::create(path).unwrap();
    let transaction = database.begin_write().unwrap();
    {
        let mut meta = transaction.open_table(META).unwrap();
        meta.insert("format", format).unwrap();
        let mut steps = transaction.open_table(STEPS).unwrap();
        for (key, value) in values {
            steps.insert(key, value).unwrap();
        }
    }
    transaction.commit().unwrap();
}
