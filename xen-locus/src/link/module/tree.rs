//! Inserts a node into a red-black tree of the kernel, and takes one out (lib/rbtree.c, include/linux/rbtree_types.h).
//!
//! A node begins with `__rb_parent_color`: the address of its parent, and in bit 0 its colour, 1 for
//! black. The root's parent is 0.

use locus_guest::addr::Gva;

use super::structure::TreeNode;
use super::words::Words;
use crate::error::{Error, Result};

/// Deepest tree believed: a red-black tree of 2^32 nodes is at most 64 deep.
const DEPTH_MAX: usize = 64;
const BLACK: u64 = 1;
const COLOR: u64 = 3;

/// Offsets in `struct rb_node`.
#[derive(Clone, Copy, Debug)]
pub struct Shape {
    /// Of `__rb_parent_color`.
    pub parent: u64,
    /// Of `rb_left`.
    pub left: u64,
    /// Of `rb_right`.
    pub right: u64,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Side {
    Left,
    Right,
}

impl Side {
    fn other(self) -> Side {
        match self {
            Side::Left => Side::Right,
            Side::Right => Side::Left,
        }
    }
}

struct Tree<'t, 'a, 'm> {
    words: &'t mut Words<'a, 'm>,
    shape: Shape,
    root: Gva,
}

fn odd(what: &str) -> Error {
    Error::not_applicable(format!(
        "the guest's tree of module addresses is not as it must be: {what}"
    ))
}

/// Inserts `new` into the tree whose root pointer is at `root`. `key_of` gives the key of a node that is in the
/// tree already.
///
/// # Errors
/// [`Class::NotApplicable`](crate::error::Class::NotApplicable): the tree is deeper than a tree can be, or breaks the rules; or memory
/// can't be read.
pub fn insert(
    words: &mut Words<'_, '_>,
    shape: Shape,
    root: Gva,
    new: TreeNode,
    key_of: impl Fn(&mut Words<'_, '_>, Gva) -> Result<u64>,
) -> Result<()> {
    let node = new.at;
    let mut link = root;
    let mut parent = Gva(0);
    let mut depth = 0;
    loop {
        let next = Gva(words.get(link)?);
        if next == Gva(0) {
            break;
        }
        depth += 1;
        if depth > DEPTH_MAX || next == node {
            return Err(odd("it has a loop, or our node already"));
        }
        parent = next;
        let left = new.key.0 < key_of(words, next)?;
        link = next.plus(if left { shape.left } else { shape.right });
    }
    words.set(node.plus(shape.parent), parent.0)?;
    words.set(node.plus(shape.left), 0)?;
    words.set(node.plus(shape.right), 0)?;
    words.set(link, node.0)?;
    let mut tree = Tree { words, shape, root };
    tree.balance(node)
}

/// Takes `node` out of the tree whose root pointer is at `root`. The node's own words stay: a lookup that stands on it
/// goes on from there.
///
/// # Errors
/// As [`insert`]; or the node is not in the tree.
pub fn erase(words: &mut Words<'_, '_>, shape: Shape, root: Gva, node: Gva) -> Result<()> {
    Tree { words, shape, root }.erase(node)
}

impl Tree<'_, '_, '_> {
    fn at(&self, side: Side) -> u64 {
        match side {
            Side::Left => self.shape.left,
            Side::Right => self.shape.right,
        }
    }

    fn parent(&mut self, node: Gva) -> Result<Gva> {
        Ok(Gva(self.words.get(node.plus(self.shape.parent))? & !COLOR))
    }

    fn is_red(&mut self, node: Gva) -> Result<bool> {
        Ok(node != Gva(0) && self.words.get(node.plus(self.shape.parent))? & BLACK == 0)
    }

    fn set_parent(&mut self, node: Gva, parent: Gva) -> Result<()> {
        let at = node.plus(self.shape.parent);
        let color = self.words.get(at)? & COLOR;
        self.words.set(at, parent.0 | color)
    }

    fn paint(&mut self, node: Gva, color: u64) -> Result<()> {
        let at = node.plus(self.shape.parent);
        let parent = self.words.get(at)? & !COLOR;
        self.words.set(at, parent | color)
    }

    fn child(&mut self, node: Gva, side: Side) -> Result<Gva> {
        Ok(Gva(self.words.get(node.plus(self.at(side)))?))
    }

    /// Where `node` hangs below `parent`.
    fn side(&mut self, parent: Gva, node: Gva) -> Result<Side> {
        if self.child(parent, Side::Left)? == node {
            return Ok(Side::Left);
        }
        if self.child(parent, Side::Right)? == node {
            return Ok(Side::Right);
        }
        Err(odd("a node's parent does not know it"))
    }

    /// Turns `top` down to `side`; its child on the other side takes its place.
    fn rotate(&mut self, top: Gva, side: Side) -> Result<()> {
        let riser = self.child(top, side.other())?;
        if riser == Gva(0) {
            return Err(odd("a node that must be there is not"));
        }
        let inner = self.child(riser, side)?;
        let parent = self.parent(top)?;
        if parent == Gva(0) {
            self.words.set(self.root, riser.0)?;
        } else {
            let which = self.side(parent, top)?;
            let at = parent.plus(self.at(which));
            self.words.set(at, riser.0)?;
        }
        let (near, far) = (self.at(side), self.at(side.other()));
        self.words.set(riser.plus(near), top.0)?;
        self.words.set(top.plus(far), inner.0)?;
        self.set_parent(riser, parent)?;
        self.set_parent(top, riser)?;
        if inner != Gva(0) {
            self.set_parent(inner, top)?;
        }
        Ok(())
    }

    /// Restores the rules after `node` was hung in red.
    fn balance(&mut self, mut node: Gva) -> Result<()> {
        for _ in 0..=DEPTH_MAX {
            let parent = self.parent(node)?;
            if parent == Gva(0) {
                return self.paint(node, BLACK);
            }
            if !self.is_red(parent)? {
                return Ok(());
            }
            let grand = self.parent(parent)?;
            if grand == Gva(0) {
                return Err(odd("its root is red"));
            }
            let side = self.side(grand, parent)?;
            let uncle = self.child(grand, side.other())?;
            if self.is_red(uncle)? {
                self.paint(uncle, BLACK)?;
                self.paint(parent, BLACK)?;
                self.paint(grand, 0)?;
                node = grand;
                continue;
            }
            let mut top = parent;
            if self.side(parent, node)? != side {
                self.rotate(parent, side)?;
                top = node;
            }
            self.paint(top, BLACK)?;
            self.paint(grand, 0)?;
            return self.rotate(grand, side.other());
        }
        Err(odd("it has a loop"))
    }

    /// Hangs `other`, which may be none, where `node` hangs. Returns its parent, and the side of it.
    fn replace(&mut self, node: Gva, other: Gva) -> Result<(Gva, Side)> {
        let parent = self.parent(node)?;
        let mut side = Side::Left;
        if parent == Gva(0) {
            if Gva(self.words.get(self.root)?) != node {
                return Err(odd("a node without a parent is not its root"));
            }
            self.words.set(self.root, other.0)?;
        } else {
            side = self.side(parent, node)?;
            let at = parent.plus(self.at(side));
            self.words.set(at, other.0)?;
        }
        if other != Gva(0) {
            self.set_parent(other, parent)?;
        }
        Ok((parent, side))
    }

    fn erase(&mut self, node: Gva) -> Result<()> {
        let left = self.child(node, Side::Left)?;
        let right = self.child(node, Side::Right)?;
        if left == Gva(0) || right == Gva(0) {
            let child = Gva(left.0 | right.0);
            let is_red = self.is_red(node)?;
            let (parent, side) = self.replace(node, child)?;
            return self.mend((child, parent, side), is_red);
        }
        // The next node in order has no left child. It takes the place and the colour of the one that goes.
        let mut next = right;
        let mut depth = 0;
        loop {
            let lower = self.child(next, Side::Left)?;
            if lower == Gva(0) {
                break;
            }
            depth += 1;
            if depth > DEPTH_MAX {
                return Err(odd("it has a loop"));
            }
            next = lower;
        }
        let is_red = self.is_red(next)?;
        let child = self.child(next, Side::Right)?;
        let mut below = (next, Side::Right);
        if next != right {
            below = self.replace(next, child)?;
            let at = next.plus(self.shape.right);
            self.words.set(at, right.0)?;
            self.set_parent(right, next)?;
        }
        let color = self.words.get(node.plus(self.shape.parent))? & BLACK;
        self.replace(node, next)?;
        self.paint(next, color)?;
        let at = next.plus(self.shape.left);
        self.words.set(at, left.0)?;
        self.set_parent(left, next)?;
        let (parent, side) = below;
        self.mend((child, parent, side), is_red)
    }

    /// Restores the rules after a node went whose place, on `side` of `parent`, `node` has now, which may be none.
    fn mend(&mut self, place: (Gva, Gva, Side), is_red: bool) -> Result<()> {
        let (mut node, mut parent, mut side) = place;
        if is_red {
            return Ok(());
        }
        for _ in 0..=DEPTH_MAX {
            if parent == Gva(0) || self.is_red(node)? {
                return match node {
                    Gva(0) => Ok(()),
                    node => self.paint(node, BLACK),
                };
            }
            let far = side.other();
            let mut sibling = self.present(parent, far)?;
            if self.is_red(sibling)? {
                self.paint(sibling, BLACK)?;
                self.paint(parent, 0)?;
                self.rotate(parent, side)?;
                sibling = self.present(parent, far)?;
            }
            let (near_one, far_one) = (self.child(sibling, side)?, self.child(sibling, far)?);
            let (near_is_red, far_is_red) = (self.is_red(near_one)?, self.is_red(far_one)?);
            if !near_is_red && !far_is_red {
                self.paint(sibling, 0)?;
                node = parent;
                parent = self.parent(node)?;
                if parent != Gva(0) {
                    side = self.side(parent, node)?;
                }
                continue;
            }
            if !far_is_red {
                self.paint(near_one, BLACK)?;
                self.paint(sibling, 0)?;
                self.rotate(sibling, far)?;
                sibling = self.present(parent, far)?;
            }
            let color = self.words.get(parent.plus(self.shape.parent))? & BLACK;
            self.paint(sibling, color)?;
            self.paint(parent, BLACK)?;
            let outer = self.present(sibling, far)?;
            self.paint(outer, BLACK)?;
            return self.rotate(parent, side);
        }
        Err(odd("it has a loop"))
    }

    /// The child of `node` on `side`, which must be there.
    fn present(&mut self, node: Gva, side: Side) -> Result<Gva> {
        match self.child(node, side)? {
            Gva(0) => Err(odd("a node that must be there is not")),
            child => Ok(child),
        }
    }
}
