//! Mocks of what is stored outside of guests, for tests: every call is noted, and one can be made to fail.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::rc::Rc;

use super::audit::entries::Entries;
use super::audit::history::Wanted;
use super::audit::in_force::{self, InForce};
use super::audit::{Action, Append, Log};
use super::xenstore::Nodes;
use crate::error::{Error, Result};

/// The calls that were made, by name. Clones share them.
#[derive(Clone, Debug, Default)]
pub(crate) struct Trace {
    calls: Rc<RefCell<Vec<&'static str>>>,
    fails: Rc<Cell<&'static str>>,
}

impl Trace {
    /// Notes a call, once if it is made several times in a row. It fails if it is the one that is to fail.
    pub(crate) fn call(&self, name: &'static str) -> Result<()> {
        let mut calls = self.calls.borrow_mut();
        if calls.last() != Some(&name) {
            calls.push(name);
        }
        match self.fails.get() == name {
            true => Err(Error::failed(format!("{name} failed"))),
            false => Ok(()),
        }
    }

    /// From now on calls of this name fail.
    pub(crate) fn fail(&self, name: &'static str) {
        self.fails.set(name);
    }

    /// The calls since the last time that this was asked.
    pub(crate) fn take(&self) -> Vec<&'static str> {
        self.calls.take()
    }
}

/// An audit log in memory. Calls: `open log`, `append`, `since`.
#[derive(Debug, Default)]
pub(crate) struct MockLog {
    pub(crate) trace: Trace,
    pub(crate) lines: RefCell<Vec<Action>>,
}

impl MockLog {
    /// Operation, patch and result of each line.
    pub(crate) fn told(&self) -> Vec<String> {
        let lines = self.lines.borrow();
        let all = lines
            .iter()
            .map(|l| format!("{} {} {}", l.op, l.patch, l.result));
        all.collect()
    }
}

impl Log for MockLog {
    fn open(&self, _uuid: &str) -> Result<Box<dyn Append + '_>> {
        self.trace.call("open log")?;
        Ok(Box::new(self))
    }

    fn in_force(&self, uuid: &str) -> Result<Vec<InForce>> {
        let lines = self.lines.borrow();
        let own = lines.iter().filter(|l| l.uuid == uuid);
        Ok(own.fold(Vec::new(), in_force::after))
    }
}

impl Entries for MockLog {
    fn last_entry(&self) -> Result<u64> {
        Ok(self.lines.borrow().len() as u64)
    }

    fn since(&self, entry: u64, wanted: Wanted<'_>) -> Result<Option<Vec<Action>>> {
        self.trace.call("since")?;
        let lines = self.lines.borrow();
        let entry = usize::try_from(entry).unwrap_or(usize::MAX);
        let later = lines.get(entry..);
        Ok(later.map(|all| all.iter().filter(|a| wanted(a)).cloned().collect()))
    }
}

impl Append for &MockLog {
    fn append(&mut self, action: Action) -> Result<()> {
        self.trace.call("append")?;
        self.lines.borrow_mut().push(action);
        Ok(())
    }
}

/// XenStore in memory. Calls: `read`, `list` (not noted), `write`, `remove`.
#[derive(Debug, Default)]
pub(crate) struct MockStore {
    pub(crate) trace: Trace,
    pub(crate) nodes: RefCell<BTreeMap<String, String>>,
    /// How many more writes succeed, plus one; 0 if all do.
    pub(crate) writes_left: Cell<usize>,
    /// A requester removes its request right before the node of this name in it is written.
    pub(crate) removed_before: Cell<&'static str>,
}

impl MockStore {
    /// After `after` more writes, each one fails; never for `usize::MAX`.
    pub(crate) fn fail_write(&self, after: usize) {
        self.writes_left.set(after.wrapping_add(1));
    }

    pub(crate) fn value(&self, path: &str) -> Option<String> {
        self.nodes.borrow().get(path).cloned()
    }

    pub(crate) fn put(&self, path: &str, value: &str) {
        self.nodes.borrow_mut().insert(path.into(), value.into());
    }
}

/// Whether `path` is `base` or below it.
fn is_at_or_below(path: &str, base: &str) -> bool {
    path.strip_prefix(base)
        .is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
}

impl Nodes for MockStore {
    fn read(&self, path: &str) -> Result<Option<String>> {
        let nodes = self.nodes.borrow();
        let has_children = || nodes.keys().any(|node| is_at_or_below(node, path));
        Ok(nodes
            .get(path)
            .cloned()
            .or_else(|| has_children().then(String::new)))
    }

    fn children(&self, path: &str) -> Result<Vec<String>> {
        let nodes = self.nodes.borrow();
        let below = nodes
            .keys()
            .filter_map(|node| node.strip_prefix(path)?.strip_prefix('/'));
        let mut names: Vec<String> = below
            .filter_map(|rest| rest.split('/').next())
            .map(str::to_owned)
            .collect();
        names.dedup();
        Ok(names)
    }

    fn write(&self, path: &str, value: &str) -> Result<()> {
        self.trace.call("write")?;
        match self.writes_left.get() {
            0 => {}
            1 => return Err(Error::failed("no more writes")),
            left => self.writes_left.set(left - 1),
        }
        if let Some((request, name)) = path.rsplit_once('/') {
            if name == self.removed_before.get() {
                let mut nodes = self.nodes.borrow_mut();
                nodes.retain(|node, _| !is_at_or_below(node, request));
            }
        }
        self.put(path, value);
        Ok(())
    }

    fn remove(&self, path: &str) -> Result<()> {
        self.trace.call("remove")?;
        let mut nodes = self.nodes.borrow_mut();
        nodes.retain(|node, _| !is_at_or_below(node, path));
        Ok(())
    }
}
